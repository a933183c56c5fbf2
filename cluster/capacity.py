"""Whether a cluster holds the work: refused where it never will, said where it does not yet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bld_core.errors import UserError

_SETTLES_S = 3.0  # within which Ray counts as free what has just ended
_TURN_S = 0.2
_STORAGE = ("AWS_", "FSSPEC_")
_ANSWER_S = 20.0  # in which a node starts a worker

Resources = Mapping[str, float]
"""What there is of each kind: "CPU" in cores, "GPU"."""


def check_nodes(workers: int, cpus: float, gpu: bool, nodes: Sequence[Resources]) -> None:
    """Refuse workers that the nodes never hold, though there may be enough of all of them together.

    Args:
        workers: that run at the same time, each on one node.
        cpus: cores of each.
        gpu: whether each has a GPU.
        nodes: what each node has.

    Raises:
        UserError: Ray would wait for ever.
    """
    rooms = [int(node.get("CPU", 0) / cpus + 1e-6) for node in nodes]
    if gpu:
        rooms = [min(room, int(node.get("GPU", 0))) for room, node in zip(rooms, nodes, strict=True)]
    if sum(rooms) >= workers:
        return
    one = f"{cpus:g} CPU cores and a GPU" if gpu else f"{cpus:g} CPU cores"
    if not any(rooms):
        able = [node.get("CPU", 0) for node in nodes if not gpu or node.get("GPU", 0) >= 1]
        most = f"the largest{' with a GPU' if gpu else ''} has {max(able, default=0):g} CPU cores"
        raise UserError(
            f"a worker of {one} fits on no single node of the Ray cluster, {most}: lower cluster.cpus_per_worker"
        )
    raise UserError(
        f"{workers} workers of {one} each do not fit on the nodes of the Ray cluster, which hold {sum(rooms)}, as no "
        "worker is shared between nodes: lower cluster.workers or cluster.cpus_per_worker"
    )


def say_if_busy(need: Resources, free: Callable[[], Resources]) -> None:
    """Say what the work waits for, where others hold it now.

    Args:
        need: of the work.
        free: asks the cluster what nobody holds.
    """
    deadline = time.monotonic() + _SETTLES_S
    while busy := _lacking(need, free()):
        if time.monotonic() >= deadline:
            # not print, which Ray Train would repeat in its own log
            sys.stderr.write(f"waiting: the Ray cluster has {busy} free, others hold the rest until they end\n")
            sys.stderr.flush()
            return
        time.sleep(_TURN_S)


@ray.remote(num_cpus=0, max_retries=0)
def _storage_variables() -> set[str]:
    """Names of the variables that say how storage is reached, as a worker has them; never their values."""
    return {name for name in os.environ if name.startswith(_STORAGE)}


def say_what_nodes_lack() -> None:
    """Say which variables of this process, that say how storage is reached, the workers of a node do not have.

    They are not sent there: Ray writes what is sent into its logs. A node may also have another way to the storage,
    such as a role that its cloud gives it.
    """
    here = {name for name in os.environ if name.startswith(_STORAGE)}
    if not here:
        return
    nodes = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    asked = {
        _storage_variables.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): place
        for node, place in nodes
    }
    ready, _ = ray.wait([*asked], num_returns=len(asked), timeout=_ANSWER_S)
    for answer in ready:
        if lacking := sorted(here - ray.get(answer)):
            sys.stderr.write(
                f"note: {', '.join(lacking)} is set here, but not where Ray was started on {asked[answer]}: set it "
                "there, too, if storage refuses its workers\n"
            )
            sys.stderr.flush()


def _lacking(need: Resources, free: Resources) -> str:
    words = {"CPU": "CPU cores", "GPU": "GPUs"}
    few = {kind: count for kind, count in need.items() if free.get(kind, 0) < count - 1e-6}
    return " and ".join(f"{free.get(kind, 0):g} of the {count:g} {words[kind]} needed" for kind, count in few.items())
