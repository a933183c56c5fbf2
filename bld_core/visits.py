"""Visits to a shard as tables with a row for each sample: read whole, cut into blocks, decoded block by block.

These callables are the stages of the ingest pipeline; they know nothing of what runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bld_core import files
from bld_core.images import AugmentationConfig, BadImage, ImageConfig, decode
from bld_core.noise import permutation
from bld_core.samples import read_shard
from bld_core.skipped import Reason

REASONS = tuple(Reason)
DELIVERED = -1
"""In the column reason, where other numbers stand for REASONS."""

_TYPES = {"data": pa.binary(), "key": pa.string(), "label": pa.int64(), "reason": pa.int8()}

Columns = dict[str, NDArray[Any]]


def read_visit(item: Columns, extensions: list[str], seed: int, rows: int) -> Iterator[pa.Table]:
    """Read the shard of one visit: what is left out, then the samples in the order of (seed, epoch).

    Args:
        item: of one row: url, visit, epoch, start (rows that are passed over).
        extensions: which files are images.
        seed: of the order.
        rows: in one block.

    Yields:
        Blocks with the columns data, key, label, reason, visit, epoch, offset (number of the row), total (rows of the
        visit).
    """
    url, visit, epoch, start = (item[name][0] for name in ("url", "visit", "epoch", "start"))
    shard = read_shard(str(url), extensions)
    order = permutation(seed, f"sample order {files.name(str(url))}", int(epoch), len(shard.samples)).tolist()
    samples = [shard.samples[i] for i in order]
    none = [None] * len(shard.left)
    columns = {
        "data": [*none, *(sample.data for sample in samples)],
        "key": [*(key for _, key in shard.left), *(sample.key for sample in samples)],
        "label": [*(-1 for _ in none), *(sample.label for sample in samples)],
        "reason": [*(REASONS.index(reason) for reason, _ in shard.left), *(DELIVERED for _ in samples)],
    }
    total = len(columns["key"])
    for first in range(int(start), total, rows):
        offset = np.arange(first, min(first + rows, total))
        block = {name: pa.array(column[first : first + rows], _TYPES[name]) for name, column in columns.items()}
        same = {"visit": visit, "epoch": epoch, "total": total}
        yield pa.table(block | {"offset": offset} | {name: np.full_like(offset, value) for name, value in same.items()})


def decode_block(table: pa.Table, data: ImageConfig, augmentation: AugmentationConfig, seed: int) -> Columns:
    """Decode and augment the images of a block.

    Args:
        table: from `read_visit`.
        data: the form of the images.
        augmentation: how they vary from epoch to epoch.
        seed: of the augmentation.

    Returns:
        The same rows with pixels for data: uint8 (rows, H, W, channels), zeros where there is no image.
    """
    names = ("label", "reason", "visit", "epoch", "offset", "total")
    columns = {name: table[name].to_numpy() for name in names}
    reasons, keys = columns["reason"].copy(), table["key"].to_pylist()
    pixels = np.zeros((len(keys), data.image_size, data.image_size, data.channels), np.uint8)
    for row in np.flatnonzero(reasons == DELIVERED):
        view = augmentation.view(seed, int(columns["epoch"][row]), keys[row])
        try:
            pixels[row] = decode(memoryview(table["data"][int(row)].as_buffer()), data, view)
        except BadImage as error:
            reasons[row] = REASONS.index(error.reason)
    return columns | {"pixels": pixels, "key": np.asarray(keys), "reason": reasons}
