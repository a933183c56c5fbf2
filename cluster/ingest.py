"""Ray Data ingest: image shards, streamed, decoded and shuffled, to one worker's training batches.

Each worker streams its own share of the shards, in an order that is a function of (seed, epoch); order is preserved
all the way, so a position in the stream is two numbers and a restart goes on with the very next image.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from bld_core import files
from bld_core.images import ImageConfig, decode_samples, read_samples
from bld_core.noise import permutation
from bld_core.training import Batch, TrainingConfig, worker_share
from cluster.runtime import DECODE_CPUS

_IMAGES_PER_BLOCK = 64
_VISITS_PER_STREAM = 256
_BYTES_AHEAD = 256 << 20

Columns = dict[str, NDArray[Any]]


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


def image_batches(
    data: ImageConfig, training: TrainingConfig, seed: int, start_step: int, start: Position, rank: int, world: int
) -> Iterator[tuple[Batch, Position]]:
    """This worker's batches from `start` on, without end, each with the position behind it.

    Raises:
        ValueError: fewer shards than workers.
    """
    urls = files.expand(data.train)
    if len(urls) < world:
        raise ValueError(
            f"{len(urls)} shards cannot feed {world} workers: use fewer workers (cluster.workers), or smaller shards"
        )
    share = worker_share(training, world)
    step = start_step
    for columns, position in _rebatch(_stream(urls, data, seed, start, rank, world), share):
        index = step * training.batch_size + rank * share + torch.arange(share)
        pixels, labels = (torch.from_numpy(columns[name]) for name in ("pixels", "label"))
        yield Batch(pixels, labels, index), position
        step += 1


def _stream(
    urls: list[str], data: ImageConfig, seed: int, start: Position, rank: int, world: int
) -> Iterator[Columns]:
    """Blocks of decoded images from `start` on: columns pixels, label, visit, offset."""
    first = start.visit
    while True:
        visits = range(first, first + _VISITS_PER_STREAM)
        items = [_visit(urls, seed, visit, rank, world) for visit in visits]
        for block in _run(items, data, seed):
            columns = {name: np.asarray(values) for name, values in block.items()}
            if columns["visit"][0] == start.visit:  # every block comes from one visit
                new = columns["offset"] >= start.offset
                columns = {name: values[new] for name, values in columns.items()}
            if len(columns["label"]):
                yield columns
        first += _VISITS_PER_STREAM


def _visit(urls: list[str], seed: int, visit: int, rank: int, world: int) -> dict[str, Any]:
    share = _share(len(urls), rank, world)
    epoch, i = divmod(visit, share)
    order = permutation(seed, "shard order", epoch, len(urls))[rank::world]
    return {"visit": visit, "epoch": epoch, "url": urls[int(order[i])]}


def _run(items: list[dict[str, Any]], data: ImageConfig, seed: int) -> Iterator[Columns]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=_BYTES_AHEAD)
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _decode_shard, batch_size=1, num_cpus=DECODE_CPUS, fn_kwargs={"data": data, "seed": seed}
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=4)


def _decode_shard(item: Columns, data: ImageConfig, seed: int) -> Iterator[Columns]:
    """One visit to a shard, as a Ray Data task: read it, order its samples by (seed, epoch, shard), decode."""
    url, epoch, visit = str(item["url"][0]), int(item["epoch"][0]), int(item["visit"][0])
    samples = list(read_samples(url, data.extensions))
    order = permutation(seed, f"sample order {files.name(url)}", epoch, len(samples)).tolist()
    images = decode_samples((samples[i] for i in order), data, Counter())
    offset = 0
    while block := list(itertools.islice(images, _IMAGES_PER_BLOCK)):
        yield {
            "pixels": np.stack([image.pixels for image in block]),
            "label": np.asarray([image.label for image in block], np.int64),
            "visit": np.full(len(block), visit, np.int64),
            "offset": np.arange(offset, offset + len(block), dtype=np.int64),
        }
        offset += len(block)


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
