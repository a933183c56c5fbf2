"""Whole shards, decoded by Ray tasks for an actor that puts their images through a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ray

from bld_core.data.blocks import decode_shard
from bld_core.data.images import ImageConfig, LabelledImage
from bld_core.data.skipped import Skipped
from cluster.ray_private.core import ahead
from cluster.runtime import DECODE_CPUS, ClusterConfig, fetch

_BATCHES_AHEAD = 2


class ShardDecoder:
    """Decodes shards by tasks, wherever there is a core, or on the nodes of cluster.decode_nodes; here, without tasks.

    Images arrive through Ray's object store: a few batches of each shard wait there, never a whole one. While the
    network is at work on one batch, the next are decoded.

    Args:
        cluster: where, and whether there are tasks.
        data: the form of the images.
        size: images of a batch; the last may be fewer.
    """

    def __init__(self, cluster: ClusterConfig, data: ImageConfig, size: int) -> None:
        self._data, self._size = data, size
        self._task: Any = None
        if cluster.decode_tasks:
            self._task = ray.remote(decode_shard).options(
                num_cpus=DECODE_CPUS,
                **cluster.decode_options,
                num_returns="streaming",
                max_retries=cluster.max_failures,
                **ahead(_BATCHES_AHEAD),
            )

    def batches(self, shard: str, skipped: Skipped) -> Iterator[list[LabelledImage]]:
        """A shard's images as they arrive; `skipped` is complete when they end."""
        asked = shard, self._data, self._size
        parts: Iterable[list[LabelledImage] | Skipped] = decode_shard(*asked)
        if self._task is not None:
            references: Any = self._task.remote(*asked)
            parts = map(fetch, references)
        for part in parts:
            if isinstance(part, Skipped):
                skipped.merge(part)
            else:
                yield part
