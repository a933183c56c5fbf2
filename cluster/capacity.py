"""Whether a cluster holds the work: refused where it never will, said where it does not yet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from bld_core.errors import UserError

_SETTLES_S = 3.0  # within which Ray counts as free what has just ended
_TURN_S = 0.2

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


def _lacking(need: Resources, free: Resources) -> str:
    words = {"CPU": "CPU cores", "GPU": "GPUs"}
    few = {kind: count for kind, count in need.items() if free.get(kind, 0) < count - 1e-6}
    return " and ".join(f"{free.get(kind, 0):g} of the {count:g} {words[kind]} needed" for kind, count in few.items())
