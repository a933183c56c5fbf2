"""WebDataset shards from the images of a folder, or from the demo digits.

What each shard holds is planned before the first is written: the bytes depend neither on the number of threads nor on
interruptions, and a finished shard is known by its size. The names of the classes lie beside them, in classes.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bld_core.data.labels import CLASSES
from bld_core.data.shards import Sample, shard_size, write_shard
from bld_core.errors import UserError
from bld_core.noise import permutation
from bld_core.storage import files
from cluster.console import Progress
from cluster.data.folder import SourceImage, read_digits, read_folder, read_image, stored_as
from cluster.secrets import check_no_password

_RECORD = "shards.json"
_PLAN = "shards-unfinished.json"


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Shards to make.

    Args:
        source: a folder of images; its sub-folders, if any, are the classes, numbered in the order of their names, or
            of their numbers where all are numbers. Links are followed; what begins with a dot is passed over, and
            what systems put beside images, such as __MACOSX.
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
    images, classes = read_digits() if config.source == "digits" else read_folder(config.source)
    plan = {split: _cut(numbers, images, config) for split, numbers in _split(images, config).items()}
    _claim(config, images, classes)
    patterns: dict[str, str] = {}
    shards: dict[str, list[int]] = {}
    for split, contents in plan.items():
        width = max(4, len(str(len(contents) - 1)))
        shards |= {f"{split}-{i:0{width}d}.tar": numbers for i, numbers in enumerate(contents)}
        patterns[split] = files.join(config.output, f"{split}-{{{0:0{width}d}..{len(contents) - 1:0{width}d}}}.tar")
    _write(shards, images, config)
    made = ShardSet(patterns, len(classes))
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
        data = read_image(source, image.name) if image.content is None else image.content
        if len(data) != image.size:
            raise UserError(f"{image.name!r} in {source!r} was changed while shards were made: run the command again")
        yield Sample(f"{number:08d}", stored_as(image.name), data, image.label)
