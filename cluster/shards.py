"""WebDataset shards from a folder of images, or from the digits that ship inside scikit-learn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bld_core import files
from bld_core.noise import permutation
from bld_core.pictures import png
from bld_core.samples import Sample, write_shard
from cluster.progress import Progress

_RECORD = "shards.json"
_DIGITS_SIZE = 32
_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Shards to make.

    Args:
        source: a folder of images; its sub-folders, if any, are the classes, numbered in the order of their names.
            "digits" is the demo set: 1,797 scanned handwritten digits, enlarged to 32 x 32.
        output: folder for the shards, a path or a URL such as s3://bucket/folder.
        images_per_shard: images in one tar file.
        validation_share: share of the images that goes into validation shards.
        seed: of the order of the images; they are shuffled once, so that every shard is a fair mixture.
    """

    source: str = "digits"
    output: str = "runs/digits"
    images_per_shard: int = 1000
    validation_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise ValueError(f"images_per_shard is {self.images_per_shard}; it must be at least 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it must lie in [0, 1)")


@dataclass(frozen=True)
class SourceImage:
    """An image yet to be stored: its file, or its pixels in the demo set; and its class, -1 for none."""

    content: Path | NDArray[np.float64]
    label: int


class ShardSet(NamedTuple):
    """Finished shards.

    Attributes:
        patterns: a brace pattern for each split that has images: the values of data.train and data.validation.
        classes: number of classes, 0 where the images have none: the value of prior.classes.
    """

    patterns: dict[str, str]
    classes: int


def make_shards(config: ShardConfig) -> ShardSet:
    """Write <output>/train-NNNN.tar and <output>/validation-NNNN.tar, and shards.json when all are there.

    Raises:
        ValueError: no images in the source, or an output that holds something else or cannot be written.
    """
    record_url = files.join(config.output, _RECORD)
    if files.exists(record_url):
        record = files.read_json(record_url)
        if record["config"] != asdict(config):
            raise ValueError(
                f"{config.output!r} holds shards made with {record['config']}, not {asdict(config)}: "
                "choose another --output, or delete that folder"
            )
        print(f"shards: already done in {config.output}")
        return ShardSet(record["patterns"], record["classes"])
    if files.exists(config.output) and files.listing(config.output):
        raise ValueError(
            f"{config.output!r} is not empty and has no {_RECORD}: it was interrupted or holds other files; "
            "choose another --output, or delete that folder"
        )
    images = _digits() if config.source == "digits" else _folder(Path(config.source))
    files.check_writable(config.output)
    order = permutation(config.seed, "make shards", 0, len(images)).tolist()
    held_out = round(len(images) * config.validation_share)
    patterns: dict[str, str] = {}
    for split, chosen in (("validation", order[:held_out]), ("train", order[held_out:])):
        size = config.images_per_shard
        starts = range(0, len(chosen), size)
        progress = Progress(f"{split} shards", len(starts))
        for shard, start in enumerate(starts):
            url = files.join(config.output, f"{split}-{shard:04d}.tar")
            write_shard(url, (_sample(images[i], i) for i in chosen[start : start + size]))
            progress.update(shard + 1)
        progress.close()
        if chosen:
            patterns[split] = files.join(config.output, f"{split}-{{0000..{len(starts) - 1:04d}}}.tar")
    made = ShardSet(patterns, 1 + max(image.label for image in images))
    files.write_json(record_url, {"config": asdict(config), **made._asdict()})
    return made


def _sample(image: SourceImage, number: int) -> Sample:
    content = image.content
    data = content.read_bytes() if isinstance(content, Path) else _digit_png(content)
    extension = content.suffix[1:].lower() if isinstance(content, Path) else "png"
    return Sample(f"{number:08d}", extension, data, image.label)


def _folder(source: Path) -> list[SourceImage]:
    paths = sorted(path for path in source.rglob("*") if path.suffix[1:].lower() in _EXTENSIONS)
    if not paths:
        raise ValueError(f"{str(source)!r} holds no images: looked for {', '.join(_EXTENSIONS)} there and below")
    classes = sorted({path.relative_to(source).parts[0] for path in paths if path.parent != source})
    return [
        SourceImage(path, -1 if path.parent == source else classes.index(path.relative_to(source).parts[0]))
        for path in paths
    ]


def _digits() -> list[SourceImage]:
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = load_digits()
    assert isinstance(digits, Bunch), "a tuple comes only with return_X_y"
    return [SourceImage(pixels, int(label)) for pixels, label in zip(digits.images, digits.target, strict=True)]


def _digit_png(digit: NDArray[np.float64]) -> bytes:
    """An 8 x 8 scan with values 0..16, enlarged, as a PNG file."""
    scan = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return png(scan.resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC))
