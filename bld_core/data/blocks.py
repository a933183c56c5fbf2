"""Visits to a shard as tables: a shard is read whole and cut into blocks of image files, which are decoded one by one.

Every sample of the shard is an entry of a block, also where it cannot be used. A block is one row, each of its columns
a list with a value for each entry: what runs these functions may neither split nor join blocks then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bld_core.data.images import AugmentationConfig, BadImage, ImageConfig, decode
from bld_core.data.shards import Sample, read_shard
from bld_core.data.skipped import Reason
from bld_core.noise import permutation
from bld_core.storage import files

REASONS = tuple(Reason)
DELIVERED = -1
"""In the column reason, where other numbers stand for REASONS."""

_BLOCK_BYTES = 16 << 20

Columns = dict[str, NDArray[Any]]


def read_visit(item: Columns, data: ImageConfig, seed: int) -> Iterator[pa.Table]:
    """Read the shard of one visit: what is left out, then the samples in the order of (seed, epoch).

    Args:
        item: of one row: url, visit, epoch, start (entries that are passed over).
        data: the form of the images.
        seed: of the order.

    Yields:
        Blocks with the columns data, key, label, reason, visit, epoch, offset (number of the entry), total (entries of
        the visit).
    """
    url, visit, epoch, start = (item[name][0] for name in ("url", "visit", "epoch", "start"))
    shard = read_shard(str(url), data.extensions, labels=data.labels)
    order = permutation(seed, f"sample order {files.name(str(url))}", int(epoch), len(shard.samples)).tolist()
    entries = [(Sample(left.name, "", b"", -1), REASONS.index(left.reason)) for left in shard.left]
    entries += [(shard.samples[i], DELIVERED) for i in order]
    for here in _cuts([len(sample.data) for sample, _ in entries], int(start), data):
        samples, reasons = zip(*entries[here], strict=True)
        offset = np.arange(here.start, here.stop)
        same = {"visit": visit, "epoch": epoch, "total": len(entries)}
        yield _pack(
            {
                "data": _binary([sample.data for sample in samples]),
                "key": pa.array([sample.key for sample in samples], pa.string()),
                "label": pa.array([sample.label for sample in samples], pa.int64()),
                "reason": pa.array(reasons, pa.int8()),
                "offset": pa.array(offset),
                **{name: pa.array(np.full_like(offset, value)) for name, value in same.items()},
            }
        )


def _cuts(sizes: list[int], start: int, data: ImageConfig) -> Iterator[slice]:
    """Cut entries into blocks that are small both as files and as pixels."""
    most = max(1, _BLOCK_BYTES // (data.image_size**2 * data.channels))
    size = 0
    for i in range(start, len(sizes)):
        if i > start and (i - start == most or size + sizes[i] > _BLOCK_BYTES):
            yield slice(start, i)
            start, size = i, 0
        size += sizes[i]
    if start < len(sizes):
        yield slice(start, len(sizes))


def decode_block(block: pa.Table, data: ImageConfig, augmentation: AugmentationConfig, seed: int) -> pa.Table:
    """Decode and augment the images of a block.

    Args:
        block: from `read_visit`.
        data: the form of the images.
        augmentation: how they vary from epoch to epoch.
        seed: of the augmentation.

    Returns:
        The same block with the column pixels for data: zeros where there is no image.
    """
    columns = {name: block[name].chunk(0).flatten() for name in block.column_names}
    reasons, epoch = columns["reason"].to_numpy().copy(), columns["epoch"][0].as_py()
    pixels = np.zeros((len(reasons), data.image_size, data.image_size, data.channels), np.uint8)
    for row in np.flatnonzero(reasons == DELIVERED).tolist():
        view = augmentation.view(seed, epoch, columns["key"][row].as_py())
        try:
            pixels[row] = decode(memoryview(columns["data"][row].as_buffer()), data, view)
        except BadImage as error:
            reasons[row] = REASONS.index(error.reason)
    width = pa.binary(pixels[0].size)
    columns["pixels"] = pa.FixedSizeBinaryArray.from_buffers(width, len(pixels), [None, pa.py_buffer(pixels)])
    columns["reason"] = pa.array(reasons)
    del columns["data"]
    return _pack(columns)


def _binary(values: list[bytes | memoryview]) -> pa.LargeBinaryArray:
    """Values side by side. `pa.array` of memoryviews (pyarrow 25) would never let go of what they are views of."""
    ends = np.cumsum([0, *map(len, values)])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)


def _pack(columns: dict[str, pa.Array]) -> pa.Table:
    return pa.table({name: pa.ListArray.from_arrays([0, len(values)], values) for name, values in columns.items()})


def unpack(block: pa.Table, data: ImageConfig) -> Columns:
    """The columns of a block from `decode_block`, pixels as uint8 (entries, H, W, channels); views where possible."""
    columns = {name: block[name].chunk(0).flatten() for name in block.column_names}
    stored = columns.pop("pixels")
    pixels = np.frombuffer(stored.buffers()[1], np.uint8)[stored.offset * stored.type.byte_width :]
    shape = (data.image_size, data.image_size, data.channels)
    return {name: values.to_numpy(zero_copy_only=False) for name, values in columns.items()} | {
        "pixels": pixels[: len(stored) * stored.type.byte_width].reshape(-1, *shape)
    }
