"""Whole shards, decoded by Ray tasks for an actor that puts their images through a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import ray

from bld_core.data.blocks import decode_shard
from bld_core.data.images import LabelledImage
from bld_core.data.skipped import Skipped
from cluster.config.experiment import Experiment
from cluster.ray_private.core import ahead
from cluster.runtime import DECODE_CPUS, fetch

_BATCHES_AHEAD = 2


class ShardDecoder:
    """Decodes shards by tasks, wherever there is a core, or on the nodes of cluster.decode_nodes; here, without tasks.

    Images arrive through Ray's object store: a few batches of each shard wait there, never a whole one. While the
    network is at work on one batch, the next are decoded.

    Args:
        experiment: the form of its images; where they are decoded; latents.batch_size, images of a batch.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._cluster, self._asked = experiment.cluster, (experiment.data, experiment.latents.batch_size)

    @cached_property
    def _task(self) -> Any:
        return ray.remote(decode_shard).options(
            num_cpus=DECODE_CPUS,
            **self._cluster.decode_options,
            num_returns="streaming",
            max_retries=self._cluster.max_failures,
            **ahead(_BATCHES_AHEAD),
        )

    def batches(self, shard: str, skipped: Skipped) -> Iterator[list[LabelledImage]]:
        """A shard's images as they arrive, the last batch perhaps smaller; `skipped` is complete when they end."""
        parts: Iterable[list[LabelledImage] | Skipped] = decode_shard(shard, *self._asked)
        if self._cluster.decode_tasks:
            references: Any = self._task.remote(shard, *self._asked)
            parts = map(fetch, references)
        for part in parts:
            if isinstance(part, Skipped):
                skipped.merge(part)
            else:
                yield part
