"""Ray Data ingest: deterministic, resumable anywhere, every image once an epoch; from a path and from S3."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import cluster.data.ingest
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.blocks import Columns, decode_block, unpack
from bld_core.data.images import AugmentationConfig, ImageConfig, first_images, read_images
from bld_core.data.shards import Sample, write_shard
from bld_core.data.skipped import Reason, Skipped
from bld_core.data.visits import read_visit
from bld_core.training.loop import Batch, TrainingConfig
from cluster.config.experiment import Experiment
from cluster.data.ingest import Ledger, Position, image_batches, resume_position
from cluster.data.shards import ShardConfig, make_shards
from cluster.runtime import ClusterConfig
from tests.bld_core.toys import png_of

TRAINING = TrainingConfig(batch_size=100)
START = Position()
PLAIN = AugmentationConfig()
GREY = png_of(np.full((8, 8), 200, np.uint8))
VARIED = AugmentationConfig(resize=1.25, flip=True)


def stream(
    data: ImageConfig,
    start: Position = START,
    step: int = 0,
    rank: int = 0,
    world: int = 1,
    augmentation: AugmentationConfig = PLAIN,
    skipped: Skipped | None = None,
    tasks: int = 1,
) -> Iterator[tuple[Batch, Position]]:
    experiment = Experiment(
        data=data,
        augmentation=augmentation,
        autoencoder_training=TRAINING,
        autoencoder=AutoencoderConfig(multipliers=[1, 2], attention=[]),
        cluster=ClusterConfig(decode_tasks=tasks),
    )
    return image_batches(experiment, step, start, rank, world, Skipped() if skipped is None else skipped)


@pytest.fixture(scope="module")
def whole(encoded: Experiment, ray_cluster: None) -> list[tuple[Batch, Position]]:
    """The first batches of a stream of augmented images; an epoch is 16.17 batches."""
    return list(itertools.islice(stream(encoded.data, augmentation=VARIED), 20))


@pytest.mark.parametrize(("stop", "tasks"), [(3, 0), (16, 0), pytest.param(16, 1, marks=pytest.mark.long)])
def test_a_stream_goes_on_exactly_where_it_stopped(
    encoded: Experiment, whole: list[tuple[Batch, Position]], stop: int, tasks: int
) -> None:
    rest = itertools.islice(stream(encoded.data, whole[stop][1], stop + 1, augmentation=VARIED, tasks=tasks), 3)
    for (resumed, position), (original, expected) in zip(rest, whole[stop + 1 :], strict=False):
        assert position == expected
        assert all(torch.equal(a, b) for a, b in zip(resumed[:3], original[:3], strict=True))


def test_images_that_are_decoded_in_the_worker_are_those_of_ray_data(
    encoded: Experiment, whole: list[tuple[Batch, Position]]
) -> None:
    here = itertools.islice(stream(encoded.data, augmentation=VARIED, tasks=0), len(whole))
    for (ours, position), (theirs, expected) in zip(here, whole, strict=True):
        assert position == expected
        assert ours.keys == theirs.keys
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_a_stream_of_small_shards_is_read_not_far_ahead(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 256 visits planned, no more than tasks and queues hold: images come soon, and nothing is read in vain."""

    def noted(item: Columns, data: ImageConfig, seed: int) -> Iterator[pa.Table]:
        (tmp_path / f"visit {item['visit'][0]}").touch()
        yield from read_visit(item, data, seed)

    monkeypatch.setattr(cluster.data.ingest, "read_visit", noted)
    write_shard(f"{tmp_path}/a.tar", [Sample(str(i), "png", GREY, 1) for i in range(100)])
    batches = stream(ImageConfig(train=f"{tmp_path}/a.tar", image_size=8, channels=1))
    next(batches)
    time.sleep(5)
    read = len(list(tmp_path.glob("visit *")))
    next(batches)
    blocks = ClusterConfig(decode_tasks=1).blocks
    assert blocks < read <= blocks * (4 + 1 + 4) + 4, "before, in and behind the tasks, and those taken"


def test_augmented_images_come_in_the_order_of_plain_ones(
    encoded: Experiment, whole: list[tuple[Batch, Position]]
) -> None:
    (plain, _), (varied, _) = next(stream(encoded.data, tasks=0)), whole[0]
    assert plain.keys == varied.keys
    assert torch.equal(plain.labels, varied.labels)
    assert not torch.equal(plain.data, varied.data)


@pytest.mark.long
def test_the_shares_of_all_workers_are_one_epoch(encoded: Experiment, ray_cluster: None) -> None:
    images: Counter[bytes] = Counter()
    for rank, world in ((0, 2), (1, 2)):
        for batch, position in stream(encoded.data, rank=rank, world=world, tasks=rank):
            if position.visit >= 2:  # four shards: two visits an epoch for each of two workers
                break
            images.update(pixels.numpy().tobytes() for pixels in batch.data)
    known = Counter(image.pixels.tobytes() for image in first_images(encoded.data.train, encoded.data, 2000))
    assert not images - known, "an image was seen twice in an epoch"
    assert sum(images.values()) >= 1617 - 2 * 2 * 50, "more is missing than the last, unfinished batches"


def test_another_number_of_workers_goes_on_at_the_start_of_the_slowest_epoch() -> None:
    saved = [[4, 17], [5, 3]]  # two shards each: epoch 2
    assert resume_position(saved, 1, 2, 4) == Position(5, 3)
    assert resume_position(saved, 0, 1, 4) == Position(8)
    assert resume_position([], 0, 1, 4) == Position()


def test_fewer_shards_than_workers_are_refused(encoded: Experiment) -> None:
    with pytest.raises(ValueError, match="4 shards cannot feed 5 workers"):
        next(stream(encoded.data, world=5))


def test_shards_on_s3_give_the_same_batches(whole: list[tuple[Batch, Position]], s3: str) -> None:
    patterns = make_shards(ShardConfig(output=f"{s3}/digits", images_per_shard=405)).patterns
    remote = ImageConfig(
        train=patterns["train"], validation=patterns["validation"], image_size=32, channels=1, extensions=["png"]
    )
    assert remote.train.startswith("s3://")
    for (ours, _), (theirs, _) in zip(itertools.islice(stream(remote, augmentation=VARIED), 3), whole, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def bad_shards(folder: Path) -> ImageConfig:
    """Two shards of 40 images: 37 and 38 are delivered, 2 and 3 things left out in every epoch."""
    for name in ("a", "b"):
        samples = [Sample(f"{name}{i:02d}", "png", GREY, 1) for i in range(40)]
        write_shard(f"{folder}/{name}.tar", [*samples[:39], samples[39]._replace(data=b"no image")])
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[: whole.index(b"a37.cls") + 600])  # cut off before its image
    data = bytearray((folder / "b.tar").read_bytes())
    data[data.index(b"b05.png") + 30] ^= 1
    (folder / "b.tar").write_bytes(data)
    return ImageConfig(train=f"{folder}/{{a,b}}.tar", image_size=8, channels=1, max_skipped=0.1)


def test_every_row_is_an_image_or_a_reason(tmp_path: Path) -> None:
    data = bad_shards(tmp_path)
    for name, delivered in (("a", 37), ("b", 38)):
        url = f"{tmp_path}/{name}.tar"
        skipped = Skipped()
        images = {image.key: image for image in read_images(url, data, skipped)}
        item = {"url": [url], "visit": [0], "epoch": [0], "start": [0]}
        tables = read_visit({name: np.asarray(value) for name, value in item.items()}, data, 0)
        blocks = [unpack(decode_block(table, data, PLAIN, 0), data) for table in tables]
        ledger = Ledger(START, Skipped(), share=1)
        entered = [ledger.enter(block, url) for block in blocks]
        assert ledger.skipped == skipped
        assert ledger.position == Position(1, 0, skipped.total)
        assert sum(len(block["key"]) for block in entered) == len(images) == delivered
        for block in entered:
            for key, pixels in zip(block["key"].tolist(), block["pixels"], strict=True):
                np.testing.assert_array_equal(pixels, images[key].pixels)


def row(visit: int, offset: int, total: int, reason: int = -1) -> Columns:
    return {name: np.asarray([value]) for name, value in locals().items()} | {"key": np.asarray(["k"])}


def test_a_row_that_is_missing_stops_the_stream() -> None:
    ledger = Ledger(Position(3, 1), Skipped(), share=2)
    ledger.enter(row(3, 1, 2), "x/a.tar")
    for wrong in (row(4, 1, 2), row(5, 0, 2), row(3, 1, 2)):
        with pytest.raises(RuntimeError, match=r"came where row 0 of 2 in visit 4 should: .* run the command again"):
            ledger.enter(wrong, "x/b.tar")
    ledger.enter(row(4, 0, 1), "x/b.tar")
    with pytest.raises(RuntimeError, match=r"'a.tar': row 0 of 1 in visit 5 came where row 0 of 2"):
        ledger.enter(row(5, 0, 1), "x/a.tar")  # it had two


def test_an_epoch_without_an_image_stops_the_stream() -> None:
    bad = list(Reason).index(Reason.UNREADABLE)
    ledger = Ledger(Position(), Skipped(), share=2)
    ledger.enter(row(0, 0, 1, bad), "x/a.tar")
    with pytest.raises(ValueError, match=r"none of the 2 shards .* 2 of 2 samples left out: 2 unreadable image"):
        ledger.enter(row(1, 0, 1, bad), "x/b.tar")


def test_what_is_left_out_is_counted_and_a_restart_goes_on_counting(ray_cluster: None, tmp_path: Path) -> None:
    data, account = bad_shards(tmp_path), Skipped()
    whole = list(itertools.islice(stream(data, skipped=account), 3))
    assert [position.skipped for _, position in whole] == sorted(position.skipped for _, position in whole)
    assert 15 <= whole[2][1].skipped <= 20, "300 images are four epochs of 75, five left out in each"
    assert account.names["unreadable image"] == ["b.tar/b39"]
    assert account.seen >= 300 + 15
    resumed, position = next(stream(data, whole[1][1], 2, tasks=0))
    assert position == whole[2][1]
    assert all(torch.equal(a, b) for a, b in zip(resumed[:3], whole[2][0][:3], strict=True))
