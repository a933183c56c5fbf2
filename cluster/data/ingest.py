"""Ray Data ingest: image shards, streamed, decoded and shuffled, to one worker's training batches.

Each worker streams its own share of the shards, in an order that is a function of (seed, epoch). Reading and decoding
are two stages: a shard is read as a whole and cut into small blocks of image files, which are then decoded in parallel
(by the worker itself, one after the other, where cluster.decode_tasks is 0); so what is held in memory does not grow
with the shards. Order is preserved all the way, and every sample that a shard holds is a row on the way, also where it
cannot be used: a position in the stream is a few numbers, a restart goes on with the very next image, and nothing can
be lost without notice.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from bld_core.data.blocks import DELIVERED, REASONS, Columns, decode_block, unpack
from bld_core.data.skipped import Left, Skipped
from bld_core.data.visits import read_visit
from bld_core.errors import UserError
from bld_core.noise import permutation
from bld_core.storage import files
from bld_core.training.loop import Batch, worker_share
from cluster.config.experiment import Experiment
from cluster.ray_private.data import Breathe, own_budget, quiet_data
from cluster.runtime import DECODE_CPUS

_VISITS_PER_STREAM = 256
_DECODE_TASKS_PER_READ = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a worker's endless stream stands.

    Attributes:
        visit: number of the shard visit; every epoch visits each of the worker's shards once.
        offset: samples of that visit already passed.
        skipped: samples left out so far, in all visits.
    """

    visit: int = 0
    offset: int = 0
    skipped: int = 0

    def behind(self, total: int) -> Position:
        """The same position; behind all `total` samples of a visit, it is the start of the next one."""
        return self if self.offset < total else Position(self.visit + 1, 0, self.skipped)


def resume_position(saved: list[list[int]], rank: int, world: int, shards: int) -> Position:
    """Where worker `rank` goes on, given the position of every worker of the checkpoint as a list.

    With as many workers as before: exactly there. With another number, the shares differ: at the start of the epoch
    that the slowest worker had reached, so that some images of it are seen again and none is left out.
    """
    if not saved:
        return Position()
    if len(saved) == world:
        return Position(*saved[rank])
    epoch = min(position[0] // _share(shards, r, len(saved)) for r, position in enumerate(saved))
    skipped = sum(Position(*position).skipped for position in saved)
    return Position(epoch * _share(shards, rank, world), 0, skipped if rank == 0 else 0)


def _share(shards: int, rank: int, world: int) -> int:
    return len(range(rank, shards, world))


def check_feed(urls: list[str], workers: int) -> None:
    """Every worker streams shards of its own.

    Raises:
        UserError: fewer shards than workers.
    """
    if len(urls) < workers:
        raise UserError(
            f"{len(urls)} shards cannot feed {workers} workers: use fewer workers (cluster.workers), or smaller shards"
        )


def image_batches(
    experiment: Experiment, start_step: int, start: Position, rank: int, world: int, skipped: Skipped
) -> Generator[tuple[Batch, Position]]:
    """One worker's batches from `start` on, without end, each with the position behind it.

    Args:
        experiment: its configuration.
        start_step: number of the step that takes the first batch.
        start: where the stream goes on.
        rank: this worker.
        world: all workers.
        skipped: the account of what is left out from here on.
    """
    training = experiment.autoencoder_training
    urls = files.expand(experiment.data.train)
    check_feed(urls, world)
    share = worker_share(training, world)
    step = start_step
    for columns, position in _rebatch(Stream(experiment, urls, rank, world, skipped).blocks(start), share):
        index = step * training.batch_size + rank * share + torch.arange(share)
        pixels, labels = (torch.from_numpy(columns[name]) for name in ("pixels", "label"))
        yield Batch(pixels, labels, index, columns["key"].tolist()), position
        step += 1


@dataclass
class Stream:
    """One worker's endless stream of decoded images.

    Attributes:
        experiment: its configuration.
        urls: all shards of the data set.
        rank: this worker.
        world: all workers.
        skipped: the account of what is left out.
    """

    experiment: Experiment
    urls: list[str]
    rank: int
    world: int
    skipped: Skipped

    def blocks(self, start: Position) -> Iterator[Columns]:
        """Blocks of decoded images from `start` on: columns pixels, label, key, visit, offset, total, skipped.

        Raises:
            UserError: a whole epoch without an image that can be used.
            RuntimeError: rows that were there are missing.
        """
        ledger = Ledger(start, self.skipped, _share(len(self.urls), self.rank, self.world))
        while True:
            first = ledger.position.visit
            visits = [self._visit(visit) for visit in range(first, first + _VISITS_PER_STREAM)]
            visits[0]["start"] = ledger.position.offset
            for block in self._execute(visits):
                columns = ledger.enter(block, visits[int(block["visit"][0]) - first]["url"])
                if len(columns["label"]):
                    yield columns

    def _visit(self, visit: int) -> dict[str, Any]:
        epoch, i = divmod(visit, _share(len(self.urls), self.rank, self.world))
        order = permutation(self.experiment.seed, "shard order", epoch, len(self.urls))[self.rank :: self.world]
        return {"visit": visit, "epoch": epoch, "url": self.urls[int(order[i])], "start": 0}

    def _execute(self, visits: list[dict[str, Any]]) -> Iterator[Columns]:
        """The blocks of some visits, in order: of a Ray Data stream, never far ahead of its consumer, or made here."""
        data, cluster, seed = self.experiment.data, self.experiment.cluster, self.experiment.seed
        if not cluster.decode_tasks:
            for visit in visits:
                for block in read_visit({name: np.array([value]) for name, value in visit.items()}, data, seed):
                    yield unpack(decode_block(block, data, self.experiment.augmentation, seed), data)
            return
        context = ray.data.DataContext.get_current()
        quiet_data(context)
        own_budget(context)
        context.custom_execution_callback_classes = [Breathe]
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=cluster.read_ahead)
        context.target_max_block_size = 1  # byte: a block of ours is one row, and goes on as it is
        dataset = (
            ray.data.from_items(visits, override_num_blocks=len(visits))
            .map_batches(
                read_visit,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out fn_kwargs and batch_format
                batch_size=1,
                num_cpus=0,
                **cluster.decode_options,
                compute=ray.data.TaskPoolStrategy(size=1 + cluster.decode_tasks // _DECODE_TASKS_PER_READ),
                fn_kwargs={"data": data, "seed": seed},
            )
            .map_batches(
                decode_block,  # pyright: ignore[reportArgumentType]
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
                **cluster.decode_options,
                compute=ray.data.TaskPoolStrategy(size=cluster.blocks),
                fn_kwargs={"data": data, "augmentation": self.experiment.augmentation, "seed": seed},
            )
        )
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield unpack(block, data)  # pyright: ignore[reportArgumentType]  # it is a table


@dataclass
class Ledger:
    """Follows a stream row by row: where it stands, that none is missing, what is left out.

    Attributes:
        position: where the stream stands.
        skipped: the account of what is left out.
        share: the worker's shards.
        totals: rows of each shard in its first visit.
        barren: visits without an image, one after the other.
        here: the account of the visit under way.
    """

    position: Position
    skipped: Skipped
    share: int
    totals: dict[str, int] = field(default_factory=dict)
    barren: int = 0
    here: Skipped = field(default_factory=Skipped)

    def enter(self, block: Columns, url: str) -> Columns:
        """The delivered rows of the next block; the column skipped is the number of those left out up to there.

        Raises:
            UserError: a whole epoch without an image.
            RuntimeError: rows are missing.
        """
        visit, offset, total = (int(block[name][0]) for name in ("visit", "offset", "total"))
        if (visit, offset) != (self.position.visit, self.position.offset) or self.totals.get(url, total) != total:
            due = f"row {self.position.offset} of {self.totals.get(url, total)} in visit {self.position.visit}"
            raise RuntimeError(
                f"shard {files.name(url)!r}: row {offset} of {total} in visit {visit} came where {due} should: the "
                "shard was changed, or a read dropped samples; run the command again"
            )
        left = block["reason"] != DELIVERED
        passed = self.position.skipped + np.cumsum(left)
        new = Skipped(int((~left).sum()))
        for row in np.flatnonzero(left):
            new.add(files.name(url), Left(REASONS[block["reason"][row]], str(block["key"][row])))
        self.skipped.merge(new)
        self.here.merge(new)
        end = offset + len(left)
        self.position = Position(visit, end, int(passed[-1])).behind(total)
        if end == total:
            self._close(url, total)
        return {name: values[~left] for name, values in block.items()} | {"skipped": passed[~left]}

    def _close(self, url: str, total: int) -> None:
        """The end of a visit."""
        if self.here.total and url not in self.totals:
            _log.warning("shard %s: %s", files.name(url), self.here)
        self.totals[url] = total
        self.barren = self.barren + 1 if self.here.total == self.here.seen else 0
        self.here = Skipped()
        if self.barren == self.share:
            raise UserError(f"none of the {self.share} shards of this worker has an image of use: {self.skipped}")


def _rebatch(blocks: Iterable[Columns], size: int) -> Iterator[tuple[Columns, Position]]:
    """Cut a stream of blocks into batches of exactly `size`, each with the position behind its last image."""
    parts: list[Columns] = []
    missing = size
    for block in blocks:
        rows = len(block["label"])
        start = 0
        while rows - start >= missing:
            parts.append({name: values[start : start + missing] for name, values in block.items()})
            batch = {name: np.concatenate([part[name] for part in parts]) for name in block}
            visit, offset, skipped, total = (int(batch[name][-1]) for name in ("visit", "offset", "skipped", "total"))
            yield batch, Position(visit, offset + 1, skipped).behind(total)
            start, missing, parts = start + missing, size, []
        parts.append({name: values[start:] for name, values in block.items()})
        missing -= rows - start
