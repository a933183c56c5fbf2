"""Packed latent shards, written: the whole data set as bits, readable by anything that reads Parquet.

One Parquet file for each image shard (no compression, no dictionary) and a manifest.json, written last. Bits are in
row-major (h, w, c) order, most significant first, as numpy.packbits.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bld_core.autoencoder.network import Autoencoder
from bld_core.autoencoder.quantizer import quantize
from bld_core.data.images import LabelledImage
from bld_core.data.tensors import stack, to_float
from bld_core.errors import UserError
from bld_core.latents.bits import pack_bits
from bld_core.noise import uniform
from bld_core.precision import Precision, autocast, ieee_float32
from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.storage.records import Part
from bld_core.training.loop import to_device

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_UNSEALED = "0" * 64  # where a file's own sha256 is to stand
_BEFORE = {"precision": "float32", "compile": False}  # of all shards from before they said so; such say it still so
Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The encoded data set.

    Args:
        draws: codes drawn for each image, z ~ Bernoulli(y); 0 stores the mode.
        mirror: also encode each image mirrored left to right.
        batch_size: images in one pass of the encoder; padded to this size, so that results never depend on a batch.
        precision: of the encoder's passes; "bfloat16" is faster on many machines, and changes some bits.
        compile: compile the encoder with torch.compile, which takes a minute at first and rounds otherwise here and
            there, so that a few bits differ.
    """

    draws: int = 1
    mirror: bool = False
    batch_size: int = 64
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.draws <= 127:
            raise UserError(f"`draws` is {self.draws}; it must be 0 (the mode) to 127", self)
        if self.batch_size < 1:
            raise UserError(f"`batch_size` is {self.batch_size}; it must be at least 1", self)


@dataclass
class LatentRows:
    """Rows of a latent shard: parallel columns, `bits` being (rows, h*w*c/8) uint8."""

    key: list[str]
    label: list[int]
    draw: list[int]
    view: list[int]
    bits: Tensor


def encode_images(
    autoencoder: Autoencoder,
    images: Iterable[LabelledImage],
    config: LatentConfig,
    seed: int,
    turn: AbstractContextManager[Any] | None = None,
) -> LatentRows:
    """Encode the images of one shard, a batch at a time as they come.

    The draw of a code is keyed on (seed, sample key, draw, view), and the encoder always runs at one padded batch
    size within the shard: the same bytes come out however the work is split.

    Args:
        autoencoder: its encoder is used.
        images: of the shard, in order.
        config: draws, views and the batch size.
        seed: of the draws.
        turn: held while a batch is encoded, but not while images are waited for, stacked or copied, where several
            shards take turns.

    Returns:
        The rows; without images, none, and bits of no width.
    """
    rows = LatentRows([], [], [], [], torch.empty(0))
    packed: list[Tensor] = []
    device = next(autoencoder.parameters()).device
    for batch in _batches(images, config.batch_size):
        x, index = _on_device(batch, config.batch_size, device)
        with turn or nullcontext():
            encoded = _encode_batch(autoencoder, x, index, config, seed)
        for view, draw, bits in encoded:
            packed.append(bits.cpu())
            rows.key += [image.key for image in batch]
            rows.label += [image.label for image in batch]
            rows.draw += [draw] * len(batch)
            rows.view += [view] * len(batch)
    if packed:
        rows.bits = torch.cat(packed)
    return rows


@torch.no_grad()
def _encode_batch(
    autoencoder: Autoencoder, x: Tensor, index: Tensor, config: LatentConfig, seed: int
) -> list[tuple[int, int, Tensor]]:
    """(view, draw, packed bits) of a batch, for each view and draw; `x` are its images, padded, `index` their keys."""
    found: list[tuple[int, int, Tensor]] = []
    for view in (0, 1) if config.mirror else (0,):
        with ieee_float32(), autocast(config.precision, x.device):
            logits = autoencoder.encode(x.flip(-1) if view else x)[: len(index)].float()
        for draw in range(max(1, config.draws)):
            u = uniform(seed, f"code draw {draw} view {view}", index, math.prod(logits.shape[1:]))
            z_BCHW = quantize(logits, u.view_as(logits) if config.draws else None)
            found.append((view, draw, pack_bits(z_BCHW.permute(0, 2, 3, 1))))
    return found


def _on_device(batch: list[LabelledImage], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images of a batch, the last again and again behind it, float (size, channels, H, W); and their keys."""
    pixels = stack(batch)
    pixels = torch.cat([pixels, pixels[-1:].expand(size - len(batch), -1, -1, -1)])
    index = torch.tensor([key_of(image.key) for image in batch])
    return to_float(to_device(pixels, device)), to_device(index, device)


def _batches(images: Iterable[LabelledImage], size: int) -> Iterator[list[LabelledImage]]:
    batch: list[LabelledImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def latent_shard_bytes(rows: LatentRows, metadata: dict[str, Any]) -> bytes:
    """The Parquet file of one shard; `metadata` (JSON values) goes into the file's own metadata.

    So does the file's sha256, as it is with 64 zeros in its place: whether the file is whole shows without a manifest.
    """
    width = rows.bits.shape[1]
    bits = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows.key), [None, pa.py_buffer(rows.bits.contiguous().numpy())]
    )
    columns = {
        "key": pa.array(rows.key, pa.string()),
        "label": pa.array(rows.label, pa.int32()),
        "draw": pa.array(rows.draw, pa.int8()),
        "view": pa.array(rows.view, pa.int8()),
        "bits": bits,
    }
    note = {"bld_latents": json.dumps({"format": FORMAT_VERSION, **metadata, "sha256": _UNSEALED}, sort_keys=True)}
    table = pa.table(columns).replace_schema_metadata(note)
    out = io.BytesIO()
    pq.write_table(table, out, compression="none", use_dictionary=False, write_statistics=False)
    return _with_digest(data := out.getvalue(), files.sha256(data))


def _with_digest(data: bytes, digest: str) -> bytes:
    """A shard with this sha256 in its footer, which is at its end; Arrow's copy, in base64, stays as it was."""
    rows, key, footer = data.rpartition(b'"sha256": "')
    return rows + key + digest.encode() + footer[len(digest) :]


def whole_shard_metadata(data: bytes) -> dict[str, Any] | None:
    """The metadata of a latent shard; None where the file is not, byte for byte, what `latent_shard_bytes` wrote.

    None, too, for shards of early versions, which do not say their sha256. A damaged file is not parsed.
    """
    unsealed = _with_digest(data, _UNSEALED)
    if _with_digest(unsealed, files.sha256(unsealed)) != data:
        return None
    metadata = shard_metadata(data)
    return {name: value for name, value in metadata.items() if name != "sha256"}


def shard_metadata(data: bytes) -> dict[str, Any]:
    """The metadata that `latent_shard_bytes` wrote, and "sha256".

    Raises:
        UserError: not a latent shard of this format.
    """
    note = (pq.read_metadata(io.BytesIO(data)).metadata or {}).get(b"bld_latents")
    metadata = json.loads(note) if note else {}
    if metadata.get("format") != FORMAT_VERSION:
        raise UserError(
            f"not a latent shard of format {FORMAT_VERSION} (format: {metadata.get('format')}); encode again",
            stages=("latents",),
        )
    return metadata


@dataclass(frozen=True)
class LatentFile:
    """What the manifest says of one file.

    Attributes:
        file: its path within the folder.
        split: which part of the data set.
        rows: in it.
        classes: one more than its largest label; 0 without labels, and where an early version did not write it down.
        sha256: of its bytes.
        source: name of the image shard.
        skipped: samples of the shard that were left out, by reason.
        bytes: its size; early versions did not write it down.
    """

    file: str
    split: Split
    rows: int
    classes: int
    sha256: str
    source: str
    skipped: dict[str, int]
    bytes: int | None = None

    @property
    def part(self) -> Part:
        """Size and sha256."""
        return Part(self.sha256, self.bytes)


def describe_file(
    file: str, data: bytes, rows: int, source: str, split: Split, skipped: Mapping[str, int]
) -> LatentFile:
    """The manifest's entry of a file with these bytes."""
    labels = pq.read_table(io.BytesIO(data), columns=["label"])["label"].to_numpy()
    classes = int(labels.max(initial=-1)) + 1
    counts = dict(sorted(skipped.items()))
    return LatentFile(file, split, rows, classes, files.sha256(data), source, counts, len(data))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an encoded data set is and how it was made.

    Attributes:
        shape: (h, w, c) of a code.
        autoencoder_hash: of the autoencoder that made it, its `codes_hash`.
        seed: of the draws.
        preprocessing: the form of the images: image_size, channels, fit.
        latents: draws, views and batch size.
        files: one for each image shard.
        classes: their names by number, where the images have a list of them.
    """

    shape: tuple[int, int, int]
    autoencoder_hash: str = ""
    seed: int = 0
    preprocessing: Mapping[str, int | str] = field(default_factory=dict[str, int | str])
    latents: LatentConfig = field(default_factory=LatentConfig)
    files: Sequence[LatentFile] = ()
    classes: Sequence[str] = ()

    def identity(self) -> dict[str, Any]:
        """How it was made, as JSON values: what every file says in its own metadata, too."""
        return {
            "shape": list(self.shape),
            "autoencoder_hash": self.autoencoder_hash,
            "seed": self.seed,
            "preprocessing": dict(self.preprocessing),
            **{name: value for name, value in asdict(self.latents).items() if value != _BEFORE.get(name)},
        }

    def made(self, metadata: Mapping[str, object]) -> bool:
        """Whether a file whose own metadata these are was made as the data set is."""
        return {**_BEFORE, **metadata}.items() >= {**_BEFORE, **self.identity()}.items()

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json."""
        named = {"classes": list(self.classes)} if self.classes else {}
        return {"format": FORMAT_VERSION, **self.identity(), **named, "files": [asdict(file) for file in self.files]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`."""
        return cls(
            shape=tuple(found["shape"]),
            autoencoder_hash=found["autoencoder_hash"],
            seed=found["seed"],
            preprocessing=found["preprocessing"],
            latents=LatentConfig(
                **{part.name: found[part.name] for part in fields(LatentConfig) if part.name in found}
            ),
            files=[LatentFile(**{"classes": 0} | entry) for entry in found["files"]],
            classes=found.get("classes", []),
        )
