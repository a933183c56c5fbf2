"""The order in which the prior sees an encoded data set, and its batches: epochs laid end to end, without a state.

A set that fits in memory is read once. A larger one streams in windows of whole shards, one in use while the next is
read. A row of the endless order has a global sample index: rows of epoch e have e*rows to (e+1)*rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bld_core.latents.bits import unpack_bits
from bld_core.latents.reader import Indices, Latents, PackedCodes
from bld_core.noise import permutation
from bld_core.training.loop import Batch, TrainingConfig, to_device, worker_share


def latent_batches(
    latents: Latents,
    config: TrainingConfig,
    seed: int,
    start_step: int,
    rank: int = 0,
    world: int = 1,
    latents_gb: float = 8.0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """One worker's share of every global batch from `start_step` on, without end.

    Epochs are laid end to end, each a seeded permutation of the rows, or of windows of shards and of the rows within
    each where the set is larger than `latents_gb`. So the batch of any step is arithmetic: a restart needs nothing but
    the step, and the global batch is the same for any number of workers.

    Args:
        latents: the data set.
        config: of the stage, for its batch size.
        seed: of the order.
        start_step: steps taken already.
        rank: of this worker.
        world: number of workers.
        latents_gb: what packed rows may take of this worker's memory, in units of 10^9 bytes.
        device: where the batches go, still packed, and are unpacked; by default the CPU.
    """
    share = worker_share(config, world)
    feed = _Feed(latents, seed, latents.window(latents_gb), device or torch.device("cpu"))
    for step in itertools.count(start_step):
        first = step * config.batch_size + rank * share
        yield feed.batch(first, share)


class _Visit(NamedTuple):
    """A window's turn in the endless order of rows: its shards, the order of their rows, the index of the first one."""

    shards: list[int]
    order: Indices
    start: int


class _Keys(Sequence[str]):
    """Keys of some rows, looked up when somebody asks: only messages do."""

    def __init__(self, keys: pa.ChunkedArray, rows: Indices) -> None:
        self._keys, self._rows = keys, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Keys(self._keys, self._rows[index])
        return self._keys[self._rows[index]].as_py()


class _Feed:
    """Batches by their index in the endless order: the window in use is in memory, the following one is being read."""

    def __init__(self, latents: Latents, seed: int, window: int, device: torch.device) -> None:
        self._latents, self._seed, self._window, self._device = latents, seed, window, device
        self._on_host = device.type == "cpu"
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, ...], Future[PackedCodes]] = {}
        self._codes: PackedCodes | None = None
        self._on_device: Tensor | None = None
        self._visit = _Visit([], np.empty(0, np.int64), 0)
        self._labels = self._order = torch.empty(0, dtype=torch.int64)  # of the visit's rows, in their order

    def batch(self, first: int, count: int) -> Batch:
        """`count` rows from the index `first` on. Every microsecond here is one of each training step."""
        begin = first - self._visit.start
        end = begin + count
        if begin < 0 or end > len(self._visit.order):
            return self._batch_across(first, count)
        codes, rows = self._codes, self._visit.order[begin:end]
        assert codes is not None, "a window is in use"
        data = codes.codes(rows) if self._on_host else self._codes_on_device(codes, begin, end)
        index = torch.arange(first, first + count, device=self._device)
        return Batch(data, self._labels[begin:end], index, _Keys(codes.keys, rows))

    def _batch_across(self, first: int, count: int) -> Batch:
        """The same where not all rows lie in the visit at hand."""
        if not 0 <= first - self._visit.start < len(self._visit.order):
            self._move(first)
        here = self._visit.start + len(self._visit.order) - first
        if here >= count:
            return self.batch(first, count)
        batch, more = self.batch(first, here), self.batch(first + here, count - here)
        data, labels, index = (torch.cat(pair) for pair in zip(batch[:3], more[:3], strict=True))
        return Batch(data, labels, index, [*batch.keys, *more.keys])

    def _codes_on_device(self, codes: PackedCodes, begin: int, end: int) -> Tensor:
        """Bits travel packed, and are unpacked where they are used."""
        if self._on_device is not None:
            packed = self._on_device[self._order[begin:end]]
        else:
            packed = codes.packed.take(self._visit.order[begin:end], axis=0)
            packed = to_device(torch.from_numpy(packed), self._device)
        h, w, c = codes.shape
        return unpack_bits(packed, (h * w, c))

    def _move(self, index: int) -> None:
        """Take the window of this index into use, and begin to read the one after it."""
        visit = self._find(index)
        if visit.shards != self._visit.shards:
            self._codes = None  # before another takes its memory
            ahead = self._ahead.pop(tuple(visit.shards), None)
            self._codes = ahead.result() if ahead else self._latents.read(visit.shards)
        assert self._codes is not None, "a window is in use"
        if self._window < len(self._latents.shards):
            following = self._find(visit.start + len(visit.order)).shards
            if following != visit.shards:
                self._ahead = {tuple(following): self._reader.submit(self._latents.read, following)}
        elif self._on_device is None and _has_room(self._device, self._codes):
            self._on_device = torch.from_numpy(self._codes.packed).to(self._device)
            self._codes = replace(self._codes, packed=self._codes.packed[:0].copy())
        self._visit = visit
        self._labels = to_device(torch.from_numpy(self._codes.labels[visit.order]), self._device)
        self._order = to_device(torch.from_numpy(visit.order), self._device)

    def _find(self, index: int) -> _Visit:
        epoch, offset = divmod(index, len(self._latents))
        sizes, start = self._latents.sizes, index - offset
        shards = list(range(len(sizes)))
        if self._window < len(sizes):
            shards = permutation(self._seed, "shard order", epoch, len(sizes)).tolist()
        for number in itertools.count():
            window = shards[number * self._window :][: self._window]
            rows = sum(sizes[shard] for shard in window)
            if index < start + rows:
                purpose = f"latent order of window {number}" if number else "latent order"
                order = permutation(self._seed, purpose, epoch, rows)
                return _Visit(window, order.numpy(), start)
            start += rows
        raise AssertionError("every index lies in a window")


def _has_room(device: torch.device, codes: PackedCodes) -> bool:
    """Whether packed codes may stay on a GPU: they take at most a quarter of it."""
    return device.type == "cuda" and codes.packed.nbytes <= torch.cuda.get_device_properties(device).total_memory / 4
