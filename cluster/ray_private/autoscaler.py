"""The autoscaler of a cluster that has one: what it is about to do for a placement group, and whether it ever can."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from ray.core.generated.autoscaler_pb2 import (
    GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]  # generated
)
from ray.exceptions import RpcError
from ray.util.placement_group import PlacementGroup

_ANSWER_S = 10


@dataclass(frozen=True)
class Growth:
    """What an autoscaler says.

    Attributes:
        coming: nodes that it has asked its cloud for, or that are starting, by the name of their kind.
        failed: what has kept the last ones from coming, in the cloud's words.
        impossible: whether a placement group fits on no nodes that it can add to those that nobody holds.
    """

    coming: Counter[str]
    failed: tuple[str, ...]
    impossible: bool

    def __str__(self) -> str:
        kinds = [f"{count} of kind {kind}" for kind, count in sorted(self.coming.items())]
        lines = [f"its autoscaler is starting {', '.join(kinds)}"] if kinds else []
        lines += [f"its autoscaler was refused: {reason}" for reason in dict.fromkeys(self.failed)]
        return "; ".join(lines)


def growth(group: PlacementGroup | None = None) -> Growth | None:
    """What the autoscaler says, of a placement group that waits; None where there is none that says anything.

    Only its second version does (KubeRay with `version: v2`, `ray up`). It also runs, and says that nothing can grow,
    where nodes are started by hand with RAY_enable_autoscaler_v2.
    """
    reply = GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    try:
        reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=_ANSWER_S))
    except RpcError:  # it may answer the next time
        return None
    state = reply.autoscaling_state
    if not state.autoscaler_state_version:
        return None
    coming = Counter({asked.ray_node_type_name: asked.count for asked in state.pending_instance_requests})
    coming.update(node.ray_node_type_name for node in state.pending_instances)
    failed = tuple(f"{each.ray_node_type_name}: {each.reason}" for each in state.failed_instance_requests)
    never = group is not None and any(
        group.id.hex() in each.details for each in state.infeasible_gang_resource_requests
    )
    return Growth(coming, failed, never)
