"""What decodes images in many processes, and needs no torch: a block of image files as a table, or a whole shard.

Every sample of a shard is an entry of a block, also where it cannot be used. A block is one row, each of its columns
a list with a value for each entry: what runs these functions may neither split nor join blocks then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bld_core.data.images import AugmentationConfig, BadImage, ImageConfig, LabelledImage, decode, read_batches
from bld_core.data.skipped import Reason, Skipped

REASONS = tuple(Reason)
DELIVERED = -1
"""In the column reason, where other numbers stand for REASONS."""

Columns = dict[str, NDArray[Any]]


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
    return pack(columns)


def pack(columns: dict[str, pa.Array]) -> pa.Table:
    """The one row of a block, of columns with a value for each entry."""
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


def decode_shard(source: str, data: ImageConfig, size: int) -> Iterator[list[LabelledImage] | Skipped]:
    """A shard's images, as they are, some at a time; and at the end what was left out."""
    skipped = Skipped()
    yield from read_batches(source, data, size, skipped)
    yield skipped
