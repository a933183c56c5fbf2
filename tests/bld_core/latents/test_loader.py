"""The order of the rows is a function of (seed, place): the same for any workers, any restart, whole or in windows."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bld_core.latents.loader import latent_batches
from bld_core.latents.reader import PackedCodes, open_latents
from bld_core.training.loop import Batch, TrainingConfig
from tests.bld_core.toys import random_latents, write_latents

SHARDS = (5, 3, 6, 4, 4, 5, 3)  # 30 rows: batches cross the ends of windows and epochs
ROWS = sum(SHARDS)
WHOLE = 1.0
A_ROW = (4 + 64) / 1e9
TWO_SHARDS, ONE_SHARD = 24.1 * A_ROW, 12.1 * A_ROW  # in a window, of which two are in memory
MEMORY = pytest.mark.parametrize("memory_gb", [WHOLE, TWO_SHARDS, ONE_SHARD])


def batches(memory_gb: float, size: int = 8, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    return latent_batches(random_latents(*SHARDS), TrainingConfig(batch_size=size), 0, start, rank, world, memory_gb)


def keys(batches: Iterator[Batch], count: int) -> list[str]:
    return [key for batch in itertools.islice(batches, count) for key in batch.keys]


def test_memory_is_counted_in_whole_shards() -> None:
    latents = random_latents(*SHARDS)
    assert [latents.window(memory) for memory in (WHOLE, TWO_SHARDS, ONE_SHARD)] == [7, 2, 1]
    assert latents.window(ROWS * A_ROW * 1.001) == 7
    assert latents.window(ROWS * A_ROW * 0.999) == 2  # as if every shard were as large as the largest
    with pytest.raises(ValueError, match=r"`latents_gb` is 8\.1e-07, but two shards of .* take 8\.16e-07: raise it"):
        latents.window(8.1e-7)


@MEMORY
def test_a_batch_is_what_the_rows_hold(memory_gb: float) -> None:
    codes = random_latents(*SHARDS).read()
    for batch in itertools.islice(batches(memory_gb), 9):
        rows = torch.tensor([int(key) for key in batch.keys])
        assert torch.equal(batch.data, codes.codes(rows.numpy()))
        assert torch.equal(batch.labels, rows % 3)
        assert batch.data.dtype == torch.uint8
        assert batch.labels.dtype == batch.sample_index.dtype == torch.int64


@MEMORY
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_the_shares_of_all_workers_are_the_batch_of_one(memory_gb: float, world: int, start: int) -> None:
    one = batches(memory_gb, start=start)
    many = [batches(memory_gb, 8, start, rank, world) for rank in range(world)]
    for _ in range(12):
        batch, parts = next(one), [next(share) for share in many]
        for whole, shares in zip(batch[:3], zip(*(part[:3] for part in parts), strict=True), strict=True):
            assert torch.equal(torch.cat(shares), whole)
        assert list(batch.keys) == [key for part in parts for key in part.keys]


@MEMORY
def test_batches_restart_anywhere_and_their_index_counts_samples(memory_gb: float) -> None:
    whole = list(itertools.islice(batches(memory_gb), 12))
    for start in range(12):
        again = next(batches(memory_gb, start=start))
        assert all(torch.equal(a, b) for a, b in zip(again[:3], whole[start][:3], strict=True))
        assert list(again.keys) == list(whole[start].keys)
    assert torch.equal(torch.cat([batch.sample_index for batch in whole]), torch.arange(96))


@MEMORY
def test_every_epoch_visits_each_row_once_in_another_order(memory_gb: float) -> None:
    seen = keys(batches(memory_gb, 4), 4 * ROWS // 4)
    epochs = [seen[i * ROWS : (i + 1) * ROWS] for i in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"{row:04d}" for row in range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_window_is_whole_shards_and_its_rows_are_mixed() -> None:
    shard_of = {f"{row:04d}": shard for row, shard in enumerate(np.repeat(range(len(SHARDS)), SHARDS).tolist())}
    seen = [shard_of[key] for key in keys(batches(TWO_SHARDS, 2), 20 * ROWS // 2)]
    orders, mixed = set[tuple[int, ...]](), 0
    for start in range(0, 20 * ROWS, ROWS):
        epoch = seen[start : start + ROWS]
        order = list(dict.fromkeys(epoch))
        place = 0
        for window in (order[0:2], order[2:4], order[4:6], order[6:]):
            rows = sum(SHARDS[shard] for shard in window)
            assert set(epoch[place : place + rows]) == set(window)
            mixed += epoch[place : place + rows] != sorted(epoch[place : place + rows], key=order.index)
            place += rows
        orders.add(tuple(order))
    assert mixed > 50  # of 60 windows of two shards
    assert len(orders) > 10


@pytest.mark.long
def test_two_windows_are_in_memory_and_no_more() -> None:
    gc.collect()
    before = {id(codes) for codes in in_memory()}
    for _ in itertools.islice(batches(TWO_SHARDS, 7), 15):
        time.sleep(0.001)  # for the next window to be read
        rows = [len(codes) for codes in in_memory() if id(codes) not in before]
        assert 1 <= len(rows) <= 2
        assert sum(rows) <= 4 * max(SHARDS)


def in_memory() -> list[PackedCodes]:
    return [thing for thing in gc.get_objects() if type(thing) is PackedCodes]


def test_a_file_that_goes_missing_stops_the_batches_with_its_name(tmp_path: Path) -> None:
    write_latents(str(tmp_path), train=SHARDS)
    latents = open_latents(str(tmp_path))
    (tmp_path / "train/3.parquet").unlink()
    stream = latent_batches(latents, TrainingConfig(batch_size=2), 0, 0, latents_gb=ONE_SHARD)
    with pytest.raises(FileNotFoundError, match=r"train/3\.parquet"):
        list(itertools.islice(stream, ROWS))


@MEMORY
def test_a_batch_larger_than_the_data_takes_whole_epochs(memory_gb: float) -> None:
    batch = next(batches(memory_gb, 3 * ROWS))
    assert set(Counter(batch.keys).values()) == {3}


def test_keys_are_looked_up_like_those_of_a_list() -> None:
    found = next(batches(WHOLE)).keys
    whole = list(found)
    assert (len(found), found[-1], found[2:5][1], list(found[2:5])) == (8, whole[-1], whole[3], whole[2:5])
    with pytest.raises(IndexError):
        found[8]


def test_bits_travel_packed_to_another_device() -> None:
    latents, config = random_latents(*SHARDS), TrainingConfig(batch_size=8)
    batch = next(latent_batches(latents, config, 0, 0, device=torch.device("meta")))
    assert (batch.data.shape, batch.data.dtype) == ((8, 4, 8), torch.uint8)
    assert {tensor.device.type for tensor in batch[:3]} == {"meta"}
