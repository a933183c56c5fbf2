"""Which nodes a cluster has, by their labels, and whether they hold the work: refused where they never will."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from bld_core.errors import UserError
from cluster.nodes.labels import Selector, matches, shown
from cluster.ray_private.core import free_of_nodes

ROUNDING = 1e-6
"""Shares of cores and GPUs are equal within it."""
Resources = Mapping[str, float]


class Bundle(NamedTuple):
    """What has to be on one node as a whole: a worker, or a task that decodes.

    Attributes:
        resources: that it takes.
        on: labels of the node; none: any node will do.
    """

    resources: Resources
    on: Selector


def reserve(bundles: Sequence[Bundle]) -> PlacementGroup:
    """A placement group of them, which waits until nodes hold them all."""
    return placement_group(
        [dict(one.resources) for one in bundles], bundle_label_selector=[dict(one.on) for one in bundles]
    )


@dataclass(frozen=True)
class Need:
    """What the work needs of the cluster at the same time.

    Attributes:
        cpus: cores.
        gpus: GPUs.
        on: selectors of which a node is to match one; none: all nodes do.
        parts: what of this is bound to some of these nodes.
    """

    cpus: float
    gpus: float
    on: tuple[Selector, ...] = ()
    parts: tuple[Need, ...] = ()

    def missing(self, have: Callable[..., Resources]) -> str:
        """What there is too little of, in words; "" where all is there.

        Args:
            have: what the nodes have that match one of the selectors it is called with.
        """
        for part in self.parts:
            if missing := part.missing(have):
                return missing
        there = have(*self.on)
        kinds = [("CPU cores", self.cpus, there.get("CPU", 0.0)), ("GPUs", self.gpus, there.get("GPU", 0.0))]
        missing = " and ".join(f"{has:g} of {need:g} {kind}" for kind, need, has in kinds if has < need - ROUNDING)
        return missing + (f" on nodes of {' or '.join(map(shown, self.on))}" if missing and self.on else "")


def rooms(cpus: float, gpus: float, nodes: Sequence[Resources]) -> list[int]:
    """How many workers each node holds at the same time.

    Args:
        cpus: cores of each worker.
        gpus: GPUs of each: 1, a share of one, which is never spread over several, or 0.
        nodes: what each node has.
    """
    found = [int(node.get("CPU", 0) / cpus + ROUNDING) for node in nodes]
    if not gpus:
        return found
    on_gpus = [int(node.get("GPU", 0)) * int(1 / gpus + ROUNDING) for node in nodes]
    return [min(pair) for pair in zip(found, on_gpus, strict=True)]


def nodes_there(*selectors: Selector) -> list[Resources]:
    """What each node has that is there, and matches one of the selectors, if there are any."""
    return [node["Resources"] for node in _matching(selectors)]


def cluster_has(*selectors: Selector) -> Resources:
    """What all these nodes have together."""
    return _sum(nodes_there(*selectors))


def cluster_has_free(*selectors: Selector) -> Resources:
    """What nobody holds of it now."""
    free = free_of_nodes()
    return _sum([free.get(node["NodeID"], {}) for node in _matching(selectors)])


def _matching(selectors: Sequence[Selector]) -> list[dict[str, Any]]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if not selectors or any(matches(node["Labels"], each) for each in selectors)]


def _sum(nodes: Sequence[Resources]) -> Resources:
    return {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}


def check_match(name: str, selector: Selector) -> None:
    """Refuse a selector that no node matches.

    Args:
        name: of the setting.
        selector: its value.

    Raises:
        UserError: Ray would wait for ever.
    """
    if nodes_there(selector):
        return
    labels = [node["Labels"] for node in _matching(())]
    have = {key: sorted({each[key] for each in labels if key in each}) for key in selector}
    said = "; ".join(f"{key} is {' or '.join(values)}" if values else f"none has {key}" for key, values in have.items())
    raise UserError(
        f"{name} is {shown(selector)}, which none of the {len(labels)} nodes of the Ray cluster matches ({said}): "
        "correct it, or start nodes with such labels (`ray start --labels`)"
    )


def part_of_cluster(named: Mapping[str, Selector]) -> str:
    """Nodes that match one of some selectors, in words.

    Args:
        named: the selectors, by the names of their settings; an empty one matches all.
    """
    if not all(named.values()):
        return "the Ray cluster"
    nodes = nodes_there(*named.values())
    size = f"{len(nodes)} of {len(nodes_there())} nodes, {_sum(nodes)['CPU']:g} CPU cores"
    each = " or ".join(f"{name} {shown(selector)}" for name, selector in named.items())
    return f"that part of the Ray cluster ({size}) which matches {each}"


def check_nodes(
    workers: int, cpus: float, gpus: float, nodes: Sequence[Resources], where: str = "the Ray cluster"
) -> None:
    """Refuse workers that the nodes never hold, though there may be enough of all of them together.

    Args:
        workers: that run at the same time, each on one node.
        cpus: cores of each.
        gpus: as in `rooms`.
        nodes: what each node has.
        where: the nodes are, in words.

    Raises:
        UserError: Ray would wait for ever.
    """
    there = rooms(cpus, gpus, nodes)
    if sum(there) >= workers:
        return
    share = f" and {'a' if gpus == 1 else f'{gpus:g} of a'} GPU" if gpus else ""
    one = f"{cpus:g} CPU cores{share}"
    if not any(there):
        able = [node.get("CPU", 0) for node in nodes if not gpus or node.get("GPU", 0) >= 1]
        most = f"the largest{' with a GPU' if gpus else ''} has {max(able, default=0):g} CPU cores"
        raise UserError(f"a worker of {one} fits on no single node of {where}, {most}: lower cluster.cpus_per_worker")
    raise UserError(
        f"{workers} workers of {one} each do not fit on the nodes of {where}, which hold {sum(there)}, as no "
        "worker is shared between nodes: lower cluster.workers or cluster.cpus_per_worker"
    )
