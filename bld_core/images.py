"""Image shards (WebDataset tar files) <-> uint8 images.

A sample is `<key>.<extension>` with, optionally, `<key>.cls`: its class index as text.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bld_core import files
from bld_core.noise import key_of, uniform


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The images: WebDataset shards and the form that they are brought into.

    Args:
        train: training shards: a path or URL with {0000..0003} braces or * globs.
        validation: held-out shards, in the same form; they are never trained on.
        image_size: side of the square images in pixels.
        channels: 1 (grey) or 3 (RGB).
        fit: how other sizes become that square: "crop" scales the short side and cuts out the centre, "pad" centres
            the image, unscaled, on black.
        extensions: file extensions that are images, in lower case.
    """

    train: str = ""
    validation: str = ""
    image_size: int = 256
    channels: Literal[1, 3] = 3
    fit: Literal["crop", "pad"] = "crop"
    extensions: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}; it must be at least 1 pixel")
        if not self.extensions:
            raise ValueError("data.extensions is empty; name at least one, for example [png]")


class View(NamedTuple):
    """How an image is shown once.

    Attributes:
        resize: its short side becomes this many times image_size.
        left: of the square, as a share of the places that it can have, in [0, 1); unused where resize is 1.
        top: the same, downwards.
        mirrored: left to right, after the cut.
    """

    resize: float
    left: float
    top: float
    mirrored: bool


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How the images of autoencoder training vary from epoch to epoch; validation and encoding take them as they are.

    Args:
        resize: the short side is scaled to this many times image_size, then a square is cut out at random; the paper
            uses 1.05. At 1 the centre is cut out, as without augmentation.
        flip: mirror each image left to right with probability 1/2.
    """

    resize: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.resize <= 2:
            raise ValueError(
                f"augmentation.resize is {self.resize}; it must be in [1, 2]: below 1 no square fits, above 2 less "
                "than a quarter of the image is left; the paper uses 1.05"
            )

    def view(self, seed: int, epoch: int, key: str) -> View | None:
        """How the sample of this key looks in an epoch: a function of (seed, epoch, key); None: as it is."""
        if self.resize == 1 and not self.flip:
            return None
        index = torch.tensor([key_of(key)])
        left, top, flip = uniform(seed, f"augmentation {epoch}", index, 3)[0].tolist()
        return View(self.resize, left, top, self.flip and flip < 0.5)


class Sample(NamedTuple):
    """One image of a shard: its key, its file as stored, its class (-1: none)."""

    key: str
    extension: str
    data: bytes
    label: int


class LabelledImage(NamedTuple):
    """One decoded image: pixels uint8 (H, W, channels)."""

    key: str
    pixels: NDArray[np.uint8]
    label: int


def read_samples(url: str, extensions: Iterable[str]) -> Iterator[Sample]:
    """The samples of a shard, in the order of the tar file, not decoded.

    Raises:
        ValueError: the shard holds no image with one of the extensions.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    wanted = list(extensions)
    seen: Counter[str] = Counter()
    found = 0
    with files.open_read(url) as stream:
        for fields in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
            extension = next((e for e in wanted if e in fields), None)
            if extension is None:
                seen.update(name for name in fields if not name.startswith("__"))
                continue
            found += 1
            label = int(fields["cls"]) if "cls" in fields else -1
            yield Sample(fields["__key__"], extension, fields[extension], label)
    if not found:
        present = ", ".join(sorted(seen)) or "nothing"
        raise ValueError(
            f"shard {url!r} holds no image: looked for {', '.join(wanted)}, found {present}; set data.extensions"
        )


def decode(data: bytes, config: ImageConfig, view: View | None = None) -> NDArray[np.uint8]:
    """Bytes of an image file -> uint8 (image_size, image_size, channels), in one view of it or as it is.

    Raises:
        OSError: the bytes are not a whole image.
        ValueError: `fit: pad`, and the image is larger than the square.
    """
    try:
        image = Image.open(io.BytesIO(data)).convert("L" if config.channels == 1 else "RGB")
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # What Pillow's decoders say of damaged headers, and of images of absurd size.
        raise OSError(f"damaged image: {error}") from error
    size = config.image_size
    varied = view is not None and view.resize > 1
    assert not (varied and config.fit == "pad"), "refused where the configurations meet"
    if image.size != (size, size) or varied:
        image = _pad(image, size) if config.fit == "pad" else _crop(image, size, view)
    pixels = np.asarray(image, dtype=np.uint8).reshape(size, size, config.channels)
    return np.ascontiguousarray(pixels[:, ::-1]) if view is not None and view.mirrored else pixels


def _crop(image: Image.Image, size: int, view: View | None) -> Image.Image:
    short = size if view is None else round(size * view.resize)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    if view is not None and view.resize > 1:
        left, top = int(view.left * (width - size + 1)), int(view.top * (height - size + 1))
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int) -> Image.Image:
    if max(image.size) > size:
        raise ValueError(f"an image of {image.size} pixels does not fit data.image_size {size}; set data.fit to crop")
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.size[0]) // 2, (size - image.size[1]) // 2))
    return canvas


def _as_is(key: str) -> None:
    """The view of validation and encoding."""


def decode_samples(
    samples: Iterable[Sample], config: ImageConfig, skipped: Counter[str], view: Callable[[str], View | None] = _as_is
) -> Iterator[LabelledImage]:
    """Decode samples in order, each in the view of its key.

    An unreadable image is left out and counted by reason in `skipped`.
    """
    for sample in samples:
        try:
            pixels = decode(sample.data, config, view(sample.key))
        except OSError:
            skipped["unreadable image"] += 1
            continue
        yield LabelledImage(sample.key, pixels, sample.label)


def read_images(url: str, config: ImageConfig, skipped: Counter[str]) -> Iterator[LabelledImage]:
    """The decoded images of a shard, as they are, in the order of the tar file."""
    return decode_samples(read_samples(url, config.extensions), config, skipped)


_SHARDS_PROBED = 64
_log = logging.getLogger(__name__)


def check_shards(config: ImageConfig, split: Literal["train", "validation"]) -> list[str]:
    """The shards of a split, after a look at the first image of each (of the first 64).

    Raises:
        ValueError: none configured, a shard without an image of the configured extensions, or an image that the
            configuration cannot take.
        FileNotFoundError: a shard is missing.
    """
    pattern = config.train if split == "train" else config.validation
    if not pattern:
        raise ValueError(f"data.{split} is empty; give shards, for example data/{split}-{{0000..0003}}.tar")
    urls = files.expand(pattern)
    for url in urls[:_SHARDS_PROBED]:
        first = next(read_samples(url, config.extensions))
        try:
            decode(first.data, config)
        except OSError as error:
            _log.warning("shard %s: its first image cannot be read (%s)", url, error)
    return urls


def stack(images: Sequence[LabelledImage]) -> Tensor:
    """The pixels of images as one tensor, uint8 (B, H, W, channels)."""
    return torch.from_numpy(np.stack([image.pixels for image in images]))


def first_images(pattern: str, config: ImageConfig, limit: int) -> list[LabelledImage]:
    """The first `limit` images of a shard pattern, for pictures and validation."""
    urls = files.expand(pattern)
    images = itertools.chain.from_iterable(read_images(url, config, Counter()) for url in urls)
    return list(itertools.islice(images, limit))


def write_shard(url: str, samples: Iterable[Sample]) -> int:
    """Write a WebDataset shard with deterministic bytes, committed when complete; returns the number of samples."""
    from webdataset.writer import TarWriter

    count = 0
    with (
        files.commit(url) as file,
        TarWriter(file, encoder=False, mtime=0) as writer,  # pyright: ignore[reportArgumentType]  # any IO[bytes] will do
    ):
        for sample in samples:
            fields = {"__key__": sample.key, sample.extension: sample.data}
            if sample.label >= 0:
                fields["cls"] = str(sample.label).encode()
            writer.write(fields)
            count += 1
    return count
