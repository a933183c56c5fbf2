"""Ray Data ingest: deterministic, resumable anywhere, every image once an epoch; from a path and from S3."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bld_core.autoencoder import AutoencoderConfig
from bld_core.images import AugmentationConfig, ImageConfig, first_images
from bld_core.samples import Sample, write_shard
from bld_core.skipped import Skipped
from bld_core.training import Batch, TrainingConfig
from cluster.experiment import Experiment
from cluster.ingest import Position, image_batches, resume_position
from cluster.runtime import ClusterConfig
from cluster.shards import ShardConfig, make_shards

TRAINING = TrainingConfig(batch_size=100)
START = Position()
PLAIN = AugmentationConfig()
VARIED = AugmentationConfig(resize=1.25, flip=True)


def stream(
    data: ImageConfig,
    start: Position = START,
    step: int = 0,
    rank: int = 0,
    world: int = 1,
    augmentation: AugmentationConfig = PLAIN,
    skipped: Skipped | None = None,
) -> Iterator[tuple[Batch, Position]]:
    experiment = Experiment(
        data=data,
        augmentation=augmentation,
        autoencoder_training=TRAINING,
        autoencoder=AutoencoderConfig(multipliers=[1, 2], attention=[]),
        cluster=ClusterConfig(decode_tasks=1),
    )
    return image_batches(experiment, step, start, rank, world, Skipped() if skipped is None else skipped)


def test_a_stream_goes_on_exactly_where_it_stopped(encoded: Experiment) -> None:
    whole = list(itertools.islice(stream(encoded.data), 20))  # an epoch is 16.17 batches
    for stop in (3, 16):
        rest = itertools.islice(stream(encoded.data, whole[stop][1], stop + 1), 3)
        for (resumed, position), (original, expected) in zip(rest, whole[stop + 1 :], strict=False):
            assert position == expected
            assert all(torch.equal(a, b) for a, b in zip(resumed[:3], original[:3], strict=True))


def test_augmented_images_are_the_same_after_a_restart_and_in_the_order_of_plain_ones(encoded: Experiment) -> None:
    whole = list(itertools.islice(stream(encoded.data, augmentation=VARIED), 18))
    resumed, position = next(stream(encoded.data, whole[16][1], 17, augmentation=VARIED))
    assert position == whole[17][1]
    assert all(torch.equal(a, b) for a, b in zip(resumed[:3], whole[17][0][:3], strict=True))
    (plain, _), (varied, _) = next(stream(encoded.data)), whole[0]
    assert torch.equal(plain.labels, varied.labels)
    assert not torch.equal(plain.data, varied.data)


def test_the_shares_of_all_workers_are_one_epoch(encoded: Experiment) -> None:
    images: Counter[bytes] = Counter()
    for rank, world in ((0, 2), (1, 2)):
        for batch, position in stream(encoded.data, rank=rank, world=world):
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


def test_shards_on_s3_give_the_same_batches(encoded: Experiment, s3: str, tmp_path: Path) -> None:
    patterns = make_shards(ShardConfig(output=f"{s3}/digits", images_per_shard=405)).patterns
    remote = ImageConfig(
        train=patterns["train"], validation=patterns["validation"], image_size=32, channels=1, extensions=["png"]
    )
    assert remote.train.startswith("s3://")
    for (ours, _), (theirs, _) in zip(itertools.islice(stream(remote), 3), stream(encoded.data), strict=False):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_unreadable_images_are_left_out_and_a_shard_of_nothing_else_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = io.BytesIO()
    Image.new("L", (8, 8), 200).save(good, "PNG")
    data = ImageConfig(image_size=8, channels=1)
    item = {"url": np.asarray([f"{tmp_path}/a.tar"]), "epoch": np.asarray([0]), "visit": np.asarray([0])}
    contents = [good.getvalue(), b"no image", good.getvalue()[:40], good.getvalue()]
    write_shard(f"{tmp_path}/a.tar", [Sample(str(i), "png", content, -1) for i, content in enumerate(contents)])
    [block] = _decode_shard(item, data, AugmentationConfig(), 0, 100)
    assert block["pixels"].shape == (2, 8, 8, 1)
    assert "2 unreadable image left out of 4" in caplog.text
    write_shard(f"{tmp_path}/a.tar", [Sample("0", "png", b"no image", -1)])
    with pytest.raises(ValueError, match=r"a.tar' holds no image that can be used \(1 unreadable image\)"):
        list(_decode_shard(item, data, AugmentationConfig(), 0, 100))
