"""Nodes that are about to be taken away: what a cloud says of its spot machines before it ends them."""

from __future__ import annotations

import time

import ray.train


class Notices:
    """Follows what Ray's core hears of nodes that will go, of those that train."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def new(self) -> str:
        """Which nodes it has heard of since the last call, and how long they stay; "" for none.

        Asked by all workers at the same steps: they wait for one another, and get the same.
        """
        notice = ray.train.get_preemption_info()
        if notice is None or self._known.issuperset(notice.preempted_node_ids):
            return ""
        nodes = [node[:8] for node in notice.preempted_node_ids if node not in self._known]
        self._known.update(notice.preempted_node_ids)
        left = "" if notice.deadline_ms is None else f" in {max(0.0, notice.deadline_ms / 1000 - time.time()):.0f} s"
        return f"node{'s' if len(nodes) > 1 else ''} {', '.join(nodes)} will be taken away{left}"
