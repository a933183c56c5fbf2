"""WebDataset shards from a folder of images, or from the digits that ship inside scikit-learn.

What each shard holds is planned before the first is written: the bytes depend neither on the number of threads nor on
interruptions, and a finished shard is known by its size. The names of the classes lie beside them, in classes.json.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bld_core.data.images import EXTENSIONS
from bld_core.data.labels import CLASSES
from bld_core.data.pictures import png
from bld_core.data.shards import Sample, shard_size, write_shard
from bld_core.errors import UserError
from bld_core.noise import permutation
from bld_core.storage import files
from cluster.console import Progress
from cluster.secrets import check_no_password

_RECORD = "shards.json"
_PLAN = "shards-unfinished.json"
_DIGITS_SIZE = 32
_KINDS = (*EXTENSIONS, "jfif")  # which is JPEG
_OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "j2k", "jp2", "jxl", "pgm", "pnm", "ppm", "psd", "tga", "tif", "tiff")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Shards to make.

    Args:
        source: a folder of images; its sub-folders, if any, are the classes, numbered in the order of their names, or
            of their numbers where all are numbers. Links are followed; what begins with a dot, and __MACOSX, is passed
            over.
            "digits" is the demo set: 1,797 scanned handwritten digits, enlarged to 32 x 32.
        output: folder for the shards, a path or a URL such as s3://bucket/folder.
        images_per_shard: images in one tar file, at the most.
        mib_per_shard: MiB of image files in one tar file, at the most; 0 for no limit. A larger image is alone in its.
        validation_share: share of the images that goes into validation shards.
        seed: of the order of the images; they are shuffled once, so that every shard is a fair mixture.
        threads: shards that are written at the same time; they are the same with any number.
    """

    source: str = "digits"
    output: str = "runs/digits"
    images_per_shard: int = 1000
    mib_per_shard: int = 0
    validation_share: float = 0.1
    seed: int = 0
    threads: int = 4

    def __post_init__(self) -> None:
        check_no_password("output", self.output)
        if self.images_per_shard < 1:
            raise UserError(f"images_per_shard is {self.images_per_shard}; it must be at least 1")
        if self.mib_per_shard < 0:
            raise UserError(f"mib_per_shard is {self.mib_per_shard}; it must be at least 1, or 0 for no limit")
        if not 0 <= self.validation_share < 1:
            raise UserError(f"validation_share is {self.validation_share}; it must lie in [0, 1)")
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}; it must be at least 1")

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written."""
        return {name: value for name, value in asdict(self).items() if name != "threads"}


class SourceImage(NamedTuple):
    """An image yet to be stored.

    Attributes:
        name: of its file, within the source folder.
        size: of its file, in bytes.
        label: its class, -1 for none.
        content: the file itself, in the demo set.
    """

    name: str
    size: int
    label: int
    content: bytes | None = None


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

    An interrupted run goes on with the shards that are missing.

    Raises:
        UserError: no images in the source, or an output that holds something else or cannot be written.
    """
    record_url = files.join(config.output, _RECORD)
    if files.exists(record_url):
        record = files.read_json(record_url)
        _compare(config, record["config"])
        print(f"shards: already done in {config.output}")
        return ShardSet(record["patterns"], record["classes"])
    images, classes = _digits() if config.source == "digits" else _folder(config.source)
    plan = {split: _cut(numbers, images, config) for split, numbers in _split(images, config).items()}
    _claim(config, images, classes)
    patterns: dict[str, str] = {}
    shards: dict[str, list[int]] = {}
    for split, contents in plan.items():
        width = max(4, len(str(len(contents) - 1)))
        shards |= {f"{split}-{i:0{width}d}.tar": numbers for i, numbers in enumerate(contents)}
        patterns[split] = files.join(config.output, f"{split}-{{{0:0{width}d}..{len(contents) - 1:0{width}d}}}.tar")
    _write(shards, images, config)
    made = ShardSet(patterns, 1 + max(image.label for image in images))
    if classes:
        files.write_bytes(files.join(config.output, CLASSES), f"{json.dumps(classes, ensure_ascii=False)}\n".encode())
    files.write_json(record_url, {"config": config.settings(), **made._asdict()})
    files.remove(files.join(config.output, _PLAN))
    return made


def _split(images: list[SourceImage], config: ShardConfig) -> dict[str, list[int]]:
    """The numbers of the images of each split that has any, shuffled."""
    order = permutation(config.seed, "make shards", 0, len(images)).tolist()
    held_out = round(len(images) * config.validation_share)
    splits = {"validation": order[:held_out], "train": order[held_out:]}
    return {split: numbers for split, numbers in splits.items() if numbers}


def _cut(numbers: list[int], images: list[SourceImage], config: ShardConfig) -> list[list[int]]:
    """Cut a split into shards, each as large as it may be."""
    limit = config.mib_per_shard << 20
    shards: list[list[int]] = []
    size = 0
    for number in numbers:
        size += images[number].size
        if not shards or len(shards[-1]) == config.images_per_shard or (limit and size > limit):
            shards.append([])
            size = images[number].size
        shards[-1].append(number)
    return shards


def _compare(config: ShardConfig, made_with: dict[str, Any]) -> None:
    """Refuse an output that was made with other settings."""
    before = {**ShardConfig().settings(), **made_with}  # a record may be older than some fields
    if before != config.settings():
        raise UserError(
            f"{config.output!r} holds shards made with {before}, not {config.settings()}: "
            "choose another --output, or delete that folder"
        )


def _claim(config: ShardConfig, images: list[SourceImage], classes: list[str]) -> None:
    """Begin an empty output, or go on with one that was begun with the same settings and the same images."""
    plan_url = files.join(config.output, _PLAN)
    digest = files.sha256("\n".join(f"{image.name} {image.size}" for image in images).encode())
    if files.exists(plan_url):
        begun = files.read_json(plan_url)
        _compare(config, begun["config"])
        if begun["source"] != digest or begun.get("classes", sorted(classes)) != classes:
            raise UserError(
                f"{config.output!r} holds unfinished shards of other images: files in {config.source!r} were added, "
                "removed or changed; choose another --output, or delete that folder"
            )
        for name in files.listing(config.output):
            if name.endswith(".tmp"):  # what a run that was killed had not finished
                files.remove(files.join(config.output, name))
        return
    if files.exists(config.output) and files.listing(config.output):
        raise UserError(
            f"{config.output!r} is not empty and has no {_RECORD}: it holds other files; "
            "choose another --output, or delete that folder"
        )
    files.check_writable(config.output)
    files.write_json(plan_url, {"config": config.settings(), "source": digest, "classes": classes})


def _write(shards: dict[str, list[int]], images: list[SourceImage], config: ShardConfig) -> None:
    """Write the shards that are missing; threads, because the work is to read and write files."""
    there = {*files.listing(config.output)}

    def write(name: str) -> None:
        url, numbers = files.join(config.output, name), shards[name]
        if name not in there:
            write_shard(url, _samples(numbers, images, config.source))
            return
        expected = shard_size((images[i].size, images[i].label) for i in numbers)
        fs, path = files.filesystem(url)
        if (found := fs.size(path)) != expected:
            raise UserError(
                f"{url!r} has {found} bytes; the shard of that name would have {expected}: it was made by something "
                "else; move it away, or choose another --output"
            )

    progress = Progress("shards", len(shards))
    pool = ThreadPoolExecutor(config.threads)
    try:
        for done, future in enumerate(as_completed([pool.submit(write, name) for name in shards]), 1):
            future.result()
            progress.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


def _samples(numbers: list[int], images: list[SourceImage], source: str) -> Iterator[Sample]:
    for number in numbers:
        image = images[number]
        data = _read(source, image.name) if image.content is None else image.content
        if len(data) != image.size:
            raise UserError(f"{image.name!r} in {source!r} was changed while shards were made: run the command again")
        extension = _extension(image.name)
        yield Sample(f"{number:08d}", "jpg" if extension == "jfif" else extension, data, image.label)


def _read(source: str, name: str) -> bytes:
    try:
        return Path(source, name).read_bytes()
    except OSError as error:
        raise _unreadable(source, name, error) from error


def _size(source: str, name: str) -> int:
    try:
        return os.path.getsize(os.path.join(source, name))
    except OSError as error:  # a link that leads nowhere, for one
        raise _unreadable(source, name, error) from error


def _unreadable(source: str, name: str, error: OSError) -> UserError:
    return UserError(f"{name!r} in {source!r} cannot be read ({error}): mend it, or move it away")


def _folder(source: str) -> tuple[list[SourceImage], list[str]]:
    """The images of a folder, and the names of its classes in their order."""
    paths, others = list[str](), Counter[str]()
    for path in _walk(source, ()):
        if _extension(path) in _KINDS:
            paths.append(os.path.relpath(path, source))
        elif _extension(path) in _OTHER_IMAGES:
            others[_extension(path)] += 1
    left = ", ".join(f"{count} .{kind}" for kind, count in sorted(others.items()))
    if not paths:
        found = f", found {left}: convert them" if left else ""
        raise UserError(f"{source!r} holds no images: looked for {', '.join(EXTENSIONS)} there and below{found}")
    if left:
        print(f"left out: {left}; shards hold {', '.join(EXTENSIONS)}: convert them, to have them too")
    paths.sort(key=lambda path: path.split(os.sep))
    classes = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    if classes and all(re.fullmatch("[0-9]+", name) for name in classes):
        classes.sort(key=lambda name: (int(name), name))
    number = {name: i for i, name in enumerate(classes)}
    images = [SourceImage(path, _size(source, path), number.get(path.split(os.sep)[0], -1)) for path in paths]
    loose = [image.name for image in images if image.label < 0]
    if classes and loose:
        raise UserError(
            f"{len(loose)} images such as {loose[0]!r} lie in {source!r} beside the folders of {len(classes)} classes "
            "and have no class: move them into one of those, or elsewhere"
        )
    return images, classes


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The files in a folder and below, also behind links; but not what systems and editors put beside images.

    Raises:
        UserError: a link to a folder above it.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder!r} is a link to a folder that it lies in: remove it")
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder!r} cannot be read ({error}): give a folder of images, or the right to read it"
        ) from error
    for name in entries:
        path = os.path.join(folder, name)
        if name.startswith(".") or name == "__MACOSX":
            continue
        if os.path.isdir(path):
            yield from _walk(path, (*above, real))
        else:
            yield path


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _digits() -> tuple[list[SourceImage], list[str]]:
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = load_digits()
    assert isinstance(digits, Bunch), "a tuple comes only with return_X_y"
    scans = [_digit_png(pixels) for pixels in digits.images]
    images = [
        SourceImage(f"{i}.png", len(scan), int(label), scan)
        for i, (scan, label) in enumerate(zip(scans, digits.target, strict=True))
    ]
    return images, [str(digit) for digit in range(10)]


def _digit_png(digit: NDArray[np.float64]) -> bytes:
    """An 8 x 8 scan with values 0..16, enlarged, as a PNG file."""
    scan = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return png(scan.resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC))
