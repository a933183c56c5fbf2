"""Visits to a shard: every image once, and no memory left behind."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bld_core.data.blocks import Columns, decode_block, unpack
from bld_core.data.images import AugmentationConfig, ImageConfig
from bld_core.data.pictures import png
from bld_core.data.shards import Sample, write_shard
from bld_core.data.visits import read_visit

DATA = ImageConfig(image_size=64, channels=3, extensions=["png"])
COUNT = 20


def visit(url: str, epoch: int = 0) -> Columns:
    item: dict[str, Any] = {"url": [url], "visit": [epoch], "epoch": [epoch], "start": [0]}
    return {name: np.array(values) for name, values in item.items()}


def write_noise(folder: Path) -> tuple[str, list[np.ndarray[Any, Any]]]:
    """A shard of images that no PNG can make smaller."""
    pixels = [*np.random.default_rng(0).integers(0, 256, (COUNT, 64, 64, 3), np.uint8)]
    url = str(folder / "noise.tar")
    write_shard(url, [Sample(f"{i}", "png", png(Image.fromarray(image)), i) for i, image in enumerate(pixels)])
    return url, pixels


def test_a_visit_gives_every_image_of_the_shard_once(tmp_path: Path) -> None:
    url, pixels = write_noise(tmp_path)
    blocks = [decode_block(block, DATA, AugmentationConfig(), 0) for block in read_visit(visit(url), DATA, 0)]
    [columns] = [unpack(block, DATA) for block in blocks]
    assert sorted(columns["label"].tolist()) == list(range(COUNT)) != columns["label"].tolist()
    assert all(np.array_equal(columns["pixels"][row], pixels[label]) for row, label in enumerate(columns["label"]))


@pytest.mark.long
def test_nothing_of_a_shard_stays_in_memory_behind_its_visit(tmp_path: Path) -> None:
    url, _ = write_noise(tmp_path)
    kept: list[int] = []
    tracemalloc.start()
    for epoch in range(5):
        assert [decode_block(block, DATA, AugmentationConfig(), 0) for block in read_visit(visit(url, epoch), DATA, 0)]
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert kept[-1] - kept[0] < 0.1 * Path(url).stat().st_size
