"""Ray Data ingest: image shards, streamed, decoded and shuffled, to one worker's training batches.

Each worker streams its own share of the shards, in an order that is a function of (seed, epoch); order is preserved
all the way, so a position in the stream is two numbers and a restart goes on with the very next image.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from bld_core import files
from bld_core.images import AugmentationConfig, ImageConfig, decode_samples, read_samples
from bld_core.noise import permutation
from bld_core.training import Batch, TrainingConfig, worker_share
from cluster.runtime import DECODE_CPUS

_VISITS_PER_STREAM = 256
_BATCHES_AHEAD = 32
_MIN_BYTES_AHEAD = 64 << 20  # with much less, Ray Data starves a fast consumer: 4 MiB stalled, 64 gave 4,000 images/s
_BLOCK_BYTES = 8 << 20
_EXECUTOR_PAUSE_S = 0.05

Columns = dict[str, NDArray[Any]]
_log = logging.getLogger(__name__)


class Breathe(ExecutionCallback):
    """A short pause in each turn of Ray Data's scheduling loop.

    While its output waits to be consumed, that loop (a thread of the training worker) spins without one, and takes
    half a core and the interpreter lock from the training step.
    """

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data once a turn."""
        time.sleep(_EXECUTOR_PAUSE_S)


@dataclass(frozen=True)
class Position:
    """Where a worker's endless stream stands.

    Attributes:
        visit: number of the shard visit; every epoch visits each of the worker's shards once.
        offset: images of that visit already used.
    """

    visit: int = 0
    offset: int = 0


def resume_position(saved: list[list[int]], rank: int, world: int, shards: int) -> Position:
    """Where worker `rank` goes on, given the [visit, offset] of every worker of the checkpoint.

    With as many workers as before: exactly there. With another number, the shares differ: at the start of the epoch
    that the slowest worker had reached, so that some images of it are seen again and none is left out.
    """
    if not saved:
        return Position()
    if len(saved) == world:
        return Position(*saved[rank])
    epoch = min(visit // _share(shards, r, len(saved)) for r, (visit, _) in enumerate(saved))
    return Position(epoch * _share(shards, rank, world))


def _share(shards: int, rank: int, world: int) -> int:
    return len(range(rank, shards, world))


def check_feed(urls: list[str], workers: int) -> None:
    """Every worker streams shards of its own.

    Raises:
        ValueError: fewer shards than workers.
    """
    if len(urls) < workers:
        raise ValueError(
            f"{len(urls)} shards cannot feed {workers} workers: use fewer workers (cluster.workers), or smaller shards"
        )


def image_batches(
    data: ImageConfig,
    augmentation: AugmentationConfig,
    training: TrainingConfig,
    seed: int,
    start_step: int,
    start: Position,
    rank: int,
    world: int,
    decode_tasks: int,
) -> Iterator[tuple[Batch, Position]]:
    """One worker's batches from `start` on, without end, each with the position behind it."""
    urls = files.expand(data.train)
    check_feed(urls, world)
    share = worker_share(training, world)
    step = start_step
    stream = Stream(urls, data, augmentation, seed, rank, world, share, decode_tasks)
    for columns, position in _rebatch(stream.blocks(start), share):
        index = step * training.batch_size + rank * share + torch.arange(share)
        pixels, labels = (torch.from_numpy(columns[name]) for name in ("pixels", "label"))
        yield Batch(pixels, labels, index, columns["key"].tolist()), position
        step += 1


@dataclass(frozen=True)
class Stream:
    """One worker's endless stream of decoded images.

    Attributes:
        urls: all shards of the data set.
        data: the form of the images.
        augmentation: how they vary from epoch to epoch.
        seed: of the order of shards and samples, and of the augmentation.
        rank: this worker.
        world: all workers.
        share: this worker's batch size, by which it reads ahead.
        decode_tasks: shards that are read and decoded at the same time.
    """

    urls: list[str]
    data: ImageConfig
    augmentation: AugmentationConfig
    seed: int
    rank: int
    world: int
    share: int
    decode_tasks: int

    def blocks(self, start: Position) -> Iterator[Columns]:
        """Blocks of decoded images from `start` on: columns pixels, label, visit, offset; each of one visit."""
        first = start.visit
        while True:
            for columns in self._execute(range(first, first + _VISITS_PER_STREAM)):
                if columns["visit"][0] == start.visit:
                    new = columns["offset"] >= start.offset
                    columns = {name: values[new] for name, values in columns.items()}
                if len(columns["label"]):
                    yield columns
            first += _VISITS_PER_STREAM

    def _visit(self, visit: int) -> dict[str, Any]:
        epoch, i = divmod(visit, _share(len(self.urls), self.rank, self.world))
        order = permutation(self.seed, "shard order", epoch, len(self.urls))[self.rank :: self.world]
        return {"visit": visit, "epoch": epoch, "url": self.urls[int(order[i])]}

    def _execute(self, visits: range) -> Iterator[Columns]:
        """Run a Ray Data stream over some visits, in order, never far ahead of its consumer."""
        image_bytes = self.data.image_size**2 * self.data.channels
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.custom_execution_callback_classes = [Breathe]
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=max(_MIN_BYTES_AHEAD, _BATCHES_AHEAD * self.share * image_bytes)
        )
        items = [self._visit(visit) for visit in visits]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _decode_shard,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out fn_kwargs and batch_format
            batch_size=1,
            num_cpus=DECODE_CPUS,
            compute=ray.data.TaskPoolStrategy(size=self.decode_tasks),
            fn_kwargs={
                "data": self.data,
                "augmentation": self.augmentation,
                "seed": self.seed,
                "block": max(1, _BLOCK_BYTES // image_bytes),
            },
        )
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            assert isinstance(block, dict), "NumPy batches are dictionaries of columns"
            yield {name: np.asarray(values) for name, values in block.items()}


def _decode_shard(
    item: Columns, data: ImageConfig, augmentation: AugmentationConfig, seed: int, block: int
) -> Iterator[Columns]:
    """One visit to a shard, as a Ray Data task: read it, order its samples by (seed, epoch, shard), decode, augment.

    Unreadable images are left out, and their number is said in the log.

    Raises:
        ValueError: none of the shard's images can be read.
    """
    url, epoch, visit = str(item["url"][0]), int(item["epoch"][0]), int(item["visit"][0])
    samples = list(read_samples(url, data.extensions))
    order = permutation(seed, f"sample order {files.name(url)}", epoch, len(samples)).tolist()
    skipped: Counter[str] = Counter()
    images = decode_samples((samples[i] for i in order), data, skipped, partial(augmentation.view, seed, epoch))
    offset = 0
    while some := list(itertools.islice(images, block)):
        yield {
            "pixels": np.stack([image.pixels for image in some]),
            "label": np.asarray([image.label for image in some], np.int64),
            "key": np.asarray([image.key for image in some]),
            "visit": np.full(len(some), visit, np.int64),
            "offset": np.arange(offset, offset + len(some), dtype=np.int64),
        }
        offset += len(some)
    if skipped:
        left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        if not offset:
            raise ValueError(f"shard {url!r} holds no image that can be used ({left_out}): mend it, or leave it out")
        _log.warning("shard %s: %s left out of %d", url, left_out, len(samples))


def _rebatch(blocks: Iterable[Columns], size: int) -> Iterator[tuple[Columns, Position]]:
    """Cut a stream of blocks into batches of exactly `size`, each with the position behind its last image."""
    rest: list[Columns] = []
    have = 0
    for block in blocks:
        rest.append(block)
        have += len(block["label"])
        if have < size:
            continue
        joined = {name: np.concatenate([part[name] for part in rest]) for name in block}
        for end in range(size, have + 1, size):
            batch = {name: values[end - size : end] for name, values in joined.items()}
            yield batch, Position(int(batch["visit"][-1]), int(batch["offset"][-1]) + 1)
        rest = [{name: values[have // size * size :] for name, values in joined.items()}]
        have %= size
