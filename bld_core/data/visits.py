"""Visits to a shard: it is read whole, put into the order of its epoch and cut into blocks of image files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from bld_core.data.blocks import DELIVERED, REASONS, Columns, pack
from bld_core.data.images import ImageConfig
from bld_core.data.shards import Sample, read_shard
from bld_core.noise import permutation
from bld_core.storage import files

_BLOCK_BYTES = 16 << 20


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
        yield pack(
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


def _binary(values: list[bytes | memoryview]) -> pa.LargeBinaryArray:
    """Values side by side. `pa.array` of memoryviews (pyarrow 25) would never let go of what they are views of."""
    ends = np.cumsum([0, *map(len, values)])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)
