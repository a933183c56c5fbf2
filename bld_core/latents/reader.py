"""An encoded data set, read: opened by its manifest, and every file checked against it. B rows, N = h*w, C = c bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.latents.writer import FORMAT_VERSION, MANIFEST, LatentFile, Manifest, Split
from bld_core.storage import files
from bld_core.storage.cache import verified
from bld_core.storage.records import Fault, parse_record, part_faults, read_file, sizes

Indices = np.ndarray[Any, np.dtype[np.int64]]

_READERS = 4  # files that are read and checked at a time, on top of the memory that the rows take
_BESIDE_BITS = 64  # bytes a row: its label, its key and its position in the order
_COLUMNS = ["key", "label", "bits"]
_STAGES = ("latents",)  # where a message says so, they are to be made again


@dataclass(frozen=True)
class PackedCodes:
    """Rows of an encoded data set, in the memory of the host.

    Attributes:
        packed: uint8 (rows, h*w*c/8).
        labels: int64 (rows,); -1 is none.
        keys: sample key of each row, strings.
        shape: (h, w, c).
    """

    packed: np.ndarray[Any, np.dtype[np.uint8]]
    labels: Indices
    keys: pa.ChunkedArray
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.packed)

    def codes(self, rows: Indices) -> Tensor:
        """The codes of the given rows as tokens: uint8 0/1 (B, N, C). By numpy, 40 times as fast as `unpack_bits`."""
        h, w, c = self.shape
        return torch.from_numpy(np.unpackbits(self.packed.take(rows, axis=0)).reshape(-1, h * w, c))

    def part(self, some: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Some rows on a device: codes, uint8 0/1 (B, N, C), and labels, int64 (B,)."""
        rows = np.arange(len(self))[some]
        return self.codes(rows).to(device), torch.from_numpy(self.labels[rows]).to(device)


@dataclass(frozen=True)
class Latents:
    """One split of an encoded data set, as its manifest tells; rows come into memory by `read`.

    Attributes:
        path: the latents folder, a path or URL.
        manifest: what the data set is and how it was made.
        shards: the manifest's entries of this split, one a file.
        hash: sha256 of the manifest, which names every file's sha256: it identifies the data.
    """

    path: str
    manifest: Manifest
    shards: Sequence[LatentFile]
    hash: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return self.manifest.shape

    @property
    def width(self) -> int:
        """Bytes of a packed code."""
        return math.prod(self.shape) // 8

    @property
    def sizes(self) -> list[int]:
        """Rows of each shard."""
        return [shard.rows for shard in self.shards]

    @property
    def classes(self) -> int:
        """One more than the largest label; 0 without labels, and where an early version did not write it down."""
        return max(shard.classes for shard in self.shards)

    def __len__(self) -> int:
        return sum(self.sizes)

    def window(self, latents_gb: float) -> int:
        """How many shards are in memory at a time: all, or else so many that two windows fit.

        Args:
            latents_gb: what the rows may take, in units of 10^9 bytes.

        Raises:
            UserError: two windows of a single shard do not fit.
        """
        a_row = self.width + _BESIDE_BITS
        if len(self) * a_row <= latents_gb * 1e9:
            return len(self.shards)
        largest = max(self.sizes) * a_row / 1e9
        if 2 * largest > latents_gb:
            raise UserError(
                f"`latents_gb` is {latents_gb}, but two shards of {self.path!r}, one in use and one being read, "
                f"take {2 * largest:.3g}: raise it, or encode smaller shards"
            )
        return int(latents_gb / 2 / largest)

    def read(self, shards: Sequence[int] | None = None) -> PackedCodes:
        """The rows of some shards, or of all, in their order; each file is checked against the manifest.

        Raises:
            MissingError: a file is missing.
            UserError: a file differs from the manifest.
        """
        chosen = self.shards if shards is None else [self.shards[shard] for shard in shards]
        ends = list(itertools.accumulate(shard.rows for shard in chosen))
        packed = np.empty((ends[-1], self.width), np.uint8)
        labels = np.empty(ends[-1], np.int64)

        def fill(shard: LatentFile, end: int) -> pa.ChunkedArray:
            table, start = self._read_file(shard), end - shard.rows
            labels[start:end] = table["label"].to_numpy()
            for bits in table["bits"].chunks:
                packed[start : start + len(bits)] = _rows(bits, self.width)
                start += len(bits)
            return table["key"]

        with ThreadPoolExecutor(_READERS) as pool:
            keys = [chunk for column in pool.map(fill, chosen, ends) for chunk in column.chunks]
        return PackedCodes(packed, labels, pa.chunked_array(keys), self.shape)

    def _read_file(self, shard: LatentFile) -> pa.Table:
        url = files.join(self.path, shard.file)
        with pq.ParquetFile(verified(url, shard.sha256)) as file:
            table = file.read(_COLUMNS, use_threads=False)
        bits, expected = table.schema.field("bits").type, pa.binary(self.width)
        if bits != expected or len(table) != shard.rows:
            raise UserError(
                f"{url!r} holds {len(table)} rows of {bits}, the manifest says {shard.rows} of {expected}, for "
                f"codes of shape {self.shape}: they do not belong together; encode again",
                stages=_STAGES,
            )
        return table


def open_latents(path: str, split: Split = "train") -> Latents:
    """Open one split of an encoded data set by its manifest, and see that its files are there; none is read yet.

    Args:
        path: the latents folder, a path or URL.
        split: which part.

    Raises:
        MissingError: no manifest: the data set was not (completely) encoded.
        UserError: files of it are missing, it has another format, or the split is empty.
    """
    return open_splits(path, split)[0]


def open_splits(path: str, *splits: Split) -> list[Latents]:
    """Several splits of an encoded data set, with its manifest read once; the errors are those of `open_latents`."""
    location = files.join(path, MANIFEST)
    if not files.exists(location):
        raise MissingError(f"{location!r} is missing: encode the data set first", stages=_STAGES)
    data = read_file(location, _STAGES)
    found = parse_record(location, data, _STAGES)
    if found.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{location!r} has format {found.get('format')}; this version reads {FORMAT_VERSION}; encode again",
            stages=_STAGES,
        )
    manifest, digest = Manifest.from_json(found), files.sha256(data)
    opened = [
        Latents(path, manifest, [shard for shard in manifest.files if shard.split == split], digest) for split in splits
    ]
    for split, latents in zip(splits, opened, strict=True):
        if not len(latents):
            raise UserError(f"{path!r} holds no {split} codes; set `{split}` and encode again", stages=_STAGES)
    if faults := latent_faults(path, manifest, splits):
        (url, reason), more = faults[0], len(faults) - 1
        raise DamagedError(url, f"{reason}, as {more} other files are faulty" if more else reason, _STAGES)
    return opened


def latent_faults(path: str, manifest: Manifest, splits: Sequence[Split]) -> list[Fault]:
    """What is wrong with the files of some splits, by one listing a folder: missing, of another size, or not listed.

    A file that nobody listed: the manifest has lost an entry, or the file does not belong there.
    """
    chosen = [shard for shard in manifest.files if shard.split in splits]
    folders: dict[str, dict[str, LatentFile]] = {}
    for shard in chosen:
        folder, _, name = shard.file.rpartition("/")
        folders.setdefault(folder, {})[name] = shard
    faults: list[Fault] = []
    for folder, listed in folders.items():
        url = files.join(path, folder) if folder else path
        there = sizes(url)
        faults += part_faults(url, there, {name: shard.part for name, shard in listed.items()}, MANIFEST, deep=False)
        others = [name for name in there if name.endswith(".parquet") and name not in listed]
        faults += [Fault(files.join(url, name), f"is not named in {MANIFEST}") for name in others]
    return faults


def _rows(bits: pa.FixedSizeBinaryArray, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    flat = np.frombuffer(bits.buffers()[1], np.uint8)[bits.offset * width :][: len(bits) * width]
    return flat.reshape(-1, width)
