"""Image files of any kind -> upright uint8 images of one form; how they vary in training."""

from __future__ import annotations

import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bld_core.data.labels import CLASSES, Labels, class_names
from bld_core.data.shards import Sample, Shard, read_shard
from bld_core.data.skipped import Left, Reason, Skipped
from bld_core.errors import UserError
from bld_core.splitmix import key_of, numbers
from bld_core.storage import files
from bld_core.storage.addresses import without_query, without_secrets

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")  # by their content; what else Pillow can open has no business in a shard
_MOST_PIXELS = 178_956_970  # Pillow's own limit
_PROBED_BYTES = 16 << 20
_SHARDS_PROBED = 64
_NAMED = 8  # extensions in a message
_log = logging.getLogger(__name__)


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
        extensions: file extensions that are images, in lower case: of jpg, jpeg, png and webp, or such as rgb.jpg,
            where a sample has files with other words before that.
        label_field: of a sample's JSON file, the field that holds its class; empty looks for label, cls and class.
        class_names: a JSON list of class names by number, for classes that are stored by name; empty takes
            classes.json beside the first training shard, where there is one.
        draft: decode a JPEG that is at least four times as large as needed at 1/2, 1/4 or 1/8 of its size, of which at
            least twice the size needed is left to scale down: 2 to 2.5 times as fast, 44 to 51 dB from the full decode.
        max_pixels: a larger image (width times height) is left out before it is decoded.
        max_skipped: share of the samples that may be left out as damaged or unusable; above it the job fails with a
            report of the reasons and the first few names.
    """

    train: str = ""
    validation: str = ""
    image_size: int = 256
    channels: Literal[1, 3] = 3
    fit: Literal["crop", "pad"] = "crop"
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    label_field: str = ""
    class_names: str = ""
    draft: bool = False
    max_pixels: int = 1 << 26
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"`image_size` is {self.image_size}; it must be at least 1 pixel", self)
        if not self.extensions:
            raise UserError("`extensions` is empty; name at least one, for example [png]", self)
        if unknown := sorted(name for name in self.extensions if name.rpartition(".")[2] not in EXTENSIONS):
            raise UserError(
                f"`extensions` names {unknown}; images are {', '.join(EXTENSIONS)}, in lower case, or end so: rgb.jpg",
                self,
            )
        if not 1 <= self.max_pixels <= _MOST_PIXELS:
            raise UserError(
                f"`max_pixels` is {self.max_pixels}; it must be 1 to {_MOST_PIXELS}, Pillow's own limit", self
            )
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"`max_skipped` is {self.max_skipped}; it is a share and must lie in [0, 1]", self)

    @property
    def labels(self) -> Labels:
        """Where the class of a sample stands."""
        first = files.sources(self.train)[0].partition("{")[0]  # a folder that braces or globs vary has no one list
        beside = without_query(first).rpartition("/")[0]
        listed = files.join(beside, CLASSES) if beside and not set("*?[") & set(beside) else ""
        return Labels(self.label_field, self.class_names or listed, bool(self.class_names))

    @property
    def names(self) -> Sequence[str]:
        """The names of the classes by number, where there is a list of them."""
        return class_names(self.labels.names, given=self.labels.given)


class View(NamedTuple):
    """How an image is shown once.

    Attributes:
        resize: its short side becomes this many times image_size.
        left: of the square, as a share of the range that it can move in, in [0, 1); unused where resize is 1.
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
            raise UserError(
                f"`resize` is {self.resize}; it must be in [1, 2]: below 1 no square fits, above 2 less than a quarter "
                "of the image is left; the paper uses 1.05",
                self,
            )

    def view(self, seed: int, epoch: int, key: str) -> View | None:
        """How the sample of this key looks in an epoch: a function of (seed, epoch, key); None: as it is."""
        if self.resize == 1 and not self.flip:
            return None
        left, top, flip = numbers(seed, f"augmentation {epoch}", key_of(key), 3)
        return View(self.resize, left, top, self.flip and flip < 0.5)


class LabelledImage(NamedTuple):
    """One decoded image: pixels uint8 (H, W, channels)."""

    key: str
    pixels: NDArray[np.uint8]
    label: int


class BadImage(OSError):  # noqa: N818  # as OSError's own children are named
    """An image file that is of no use.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: Reason, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode(data: bytes | memoryview, config: ImageConfig, view: View | None = None) -> NDArray[np.uint8]:
    """Bytes of an image file -> uint8 (image_size, image_size, channels), in one view of it or as it is.

    The image is turned upright as its EXIF orientation says; transparent parts show white; of 16 bits the upper 8 are
    kept.

    Raises:
        BadImage: the bytes are not a whole image, or it is larger than the configuration allows.
    """
    size = config.image_size
    varied = view is not None and view.resize > 1
    assert not (varied and config.fit == "pad"), "refused where the configurations meet"
    short = round(size * view.resize) if view is not None else size
    image = _open(data, config, short)
    if image.size != (size, size) or varied:
        image = _pad(image, size) if config.fit == "pad" else _crop(image, size, short, view, config.max_pixels)
    pixels = np.asarray(image, dtype=np.uint8).reshape(size, size, config.channels)
    return np.ascontiguousarray(pixels[:, ::-1]) if view is not None and view.mirrored else pixels


def _open(data: bytes | memoryview, config: ImageConfig, short: int) -> Image.Image:
    """A whole image, upright, of which the short side is to become `short`; mode L or RGB."""
    if not len(data):
        raise BadImage(Reason.EMPTY, "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels <= config.max_pixels:
            if config.draft and config.fit == "crop":
                image.draft(None, (2 * short, 2 * short))
            ImageOps.exif_transpose(image, in_place=True)
            return _eight_bits(image).convert("L" if config.channels == 1 else "RGB")
    except Image.DecompressionBombError as error:
        raise BadImage(Reason.TOO_LARGE, error) from error
    except MemoryError:
        raise
    except Exception as error:  # there is nothing that some decoder of Pillow's does not raise of some file
        raise BadImage(Reason.UNREADABLE, f"{type(error).__name__}: {error}") from error
    raise BadImage(Reason.TOO_LARGE, f"{pixels} pixels")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same image, opaque, with 8 bits a channel."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _crop(image: Image.Image, size: int, short: int, view: View | None, most: int) -> Image.Image:
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    if width * height > most:
        raise BadImage(Reason.TOO_LARGE, f"{image.size} pixels, scaled to {(width, height)}")
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    if view is not None and view.resize > 1:
        left, top = int(view.left * (width - size + 1)), int(view.top * (height - size + 1))
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int) -> Image.Image:
    if max(image.size) > size:
        raise BadImage(Reason.NO_FIT, f"{image.size} pixels, the square has {size}")
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.size[0]) // 2, (size - image.size[1]) // 2))
    return canvas


def _as_is(key: str) -> None:
    """The view of validation and encoding."""


def decode_samples(
    shard: str,
    samples: Iterable[Sample],
    config: ImageConfig,
    skipped: Skipped,
    view: Callable[[str], View | None] = _as_is,
) -> Iterator[LabelledImage]:
    """Decode samples of a shard in order, each in the view of its key; what is of no use is counted in `skipped`."""
    for sample in samples:
        try:
            pixels = decode(sample.data, config, view(sample.key))
        except BadImage as error:
            skipped.add(shard, Left(error.reason, sample.key))
            continue
        skipped.seen += 1
        yield LabelledImage(sample.key, pixels, sample.label)


def read_images(url: str, config: ImageConfig, skipped: Skipped) -> Iterator[LabelledImage]:
    """The decoded images of a shard, as they are, in the order of the tar file; everything else goes to `skipped`."""
    name, shard = files.name(url), read_shard(url, config.extensions, labels=config.labels)
    skipped.add(name, *shard.left)
    return decode_samples(name, shard.samples, config, skipped)


def read_batches(url: str, config: ImageConfig, size: int, skipped: Skipped) -> Iterator[list[LabelledImage]]:
    """The same, `size` images at a time; the last may be fewer."""
    images = read_images(url, config, skipped)
    while batch := list(itertools.islice(images, size)):
        yield batch


@dataclass(frozen=True)
class Survey:
    """What the beginning of each of the first shards of a split holds.

    Attributes:
        urls: all shards of the split.
        whole: whether that was all samples of all of them.
        images: samples with an image; none of them but the first of each shard was decoded.
        labels: how many of them are of each class; -1 is none.
        mixed: a shard whose samples have no class, and one whose have; None where all are alike.
    """

    urls: list[str]
    whole: bool
    images: int
    labels: Counter[int]
    mixed: tuple[str, str] | None = None

    @property
    def classes(self) -> list[int]:
        """The classes that were met, in order."""
        return sorted(label for label in self.labels if label >= 0)


def check_shards(config: ImageConfig, split: Literal["train", "validation"]) -> list[str]:
    """The shards of a split, as `survey_shards` finds them, with its errors."""
    return survey_shards(config, split).urls


def survey_shards(config: ImageConfig, split: Literal["train", "validation"]) -> Survey:
    """Read the beginning of each shard of a split (of the first 64): decode its first image, and see the classes.

    Raises:
        UserError: none configured, one that cannot be read, one that is no tar file, a shard without an image of the
            configured extensions, or an image that the configuration cannot take.
        MissingError: a shard is missing.
    """
    pattern = config.train if split == "train" else config.validation
    if not pattern:
        raise UserError(f"`{split}` is empty; give shards, for example data/{split}-{{0000..0003}}.tar", config)
    try:
        urls = files.expand(pattern)
        probed = [_check_shard(url, config) for url in urls[:_SHARDS_PROBED]]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"`{split}` names what cannot be read ({error}); give tar files", config) from error
    samples = [sample for shard in probed for sample in shard.samples]
    labelled = {shard.samples[0].label >= 0: url for url, shard in zip(urls, probed, strict=False) if shard.samples}
    whole = len(probed) == len(urls) and not any(
        left.reason == Reason.TRUNCATED for shard in probed for left in shard.left
    )
    mixed = (labelled[False], labelled[True]) if len(labelled) == 2 else None
    return Survey(urls, whole, len(samples), Counter(sample.label for sample in samples), mixed)


def _check_shard(url: str, config: ImageConfig) -> Shard:
    """The beginning of a shard, or all of it where there is no sample before."""
    shown, labels = without_secrets(url), config.labels
    shard = read_shard(url, config.extensions, _PROBED_BYTES, labels)
    if not shard.samples:
        shard = read_shard(url, config.extensions, labels=labels)
    reasons = {left.reason for left in shard.left}
    if Reason.NO_TAR in reasons:
        raise UserError(f"shard {shown!r} is no tar file but {shard.left[0].key}")
    if shard.samples:
        first = shard.samples[0]
        try:
            decode(first.data, config)
        except BadImage as error:
            if error.reason == Reason.NO_FIT:
                raise UserError(
                    f"{first.key!r} in shard {shown!r} is an {error}: raise `image_size`, or set `fit` to crop",
                    config,
                ) from error
            _log.warning("shard %s: its first image cannot be used (%s)", shown, error)
    elif reasons == {Reason.NO_IMAGE}:
        others = sorted(shard.others)
        found = ", ".join([*others[:_NAMED], *([f"and {len(others) - _NAMED} more"] if len(others) > _NAMED else [])])
        raise UserError(
            f"shard {shown!r} holds no image: looked for {', '.join(config.extensions)}, found {found or 'nothing'}; "
            "set `extensions`, or rename files whose keys have dots: the first dot ends a key"
        )
    else:
        _log.warning("shard %s holds no image that can be used: %s, ...", shown, shard.left[0].reason)
    return shard


def first_images(pattern: str, config: ImageConfig, limit: int) -> list[LabelledImage]:
    """The first `limit` images of a shard pattern, for pictures and validation.

    Raises:
        UserError: none can be read.
    """
    urls = files.expand(pattern)
    skipped = Skipped()
    images = itertools.chain.from_iterable(read_images(url, config, skipped) for url in urls)
    found = list(itertools.islice(images, limit))
    if not found:
        raise UserError(f"none of the images of {pattern!r} can be read: {skipped}; mend them, or give other shards")
    return found
