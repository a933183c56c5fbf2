"""One check of the whole configuration against the data: what a later stage would refuse, before the first."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from bld_core.data.images import Survey, first_images, survey_shards
from bld_core.data.labels import CLASSES
from bld_core.errors import UserError
from bld_core.storage.addresses import without_query, without_secrets
from cluster.config.experiment import Experiment

_HELD_OUT = 2  # images: the likelihood bound has an error


class Shards(NamedTuple):
    """The shards of both splits."""

    train: list[str]
    validation: list[str]


def check_data(experiment: Experiment) -> Shards:
    """Read the beginning of the first shards of both splits, and compare it with what all stages ask for.

    Of large data sets that is not all: then a stage may still find later what is not to be seen here.

    Raises:
        UserError: one message for each thing that a stage of this configuration would refuse.
        MissingError: a shard is missing.
    """
    train, held_out = (survey_shards(experiment.data, split) for split in ("train", "validation"))
    for seen in (train, held_out):
        shard_names(seen.urls)
    if not train.images:
        first_images(experiment.data.train, experiment.data, 1)  # which says why there is none
    images = first_images(experiment.data.validation, experiment.data, _HELD_OUT)
    if len(images) < _HELD_OUT:
        raise UserError(
            f"data.validation holds {len(images)} image that can be read; the likelihood bound and its error need at "
            f"least {_HELD_OUT}: add some"
        )
    _check_classes(experiment, train, held_out)
    for name, least in experiment.evaluation.images_needed.items():
        if train.whole and train.images < least:
            raise UserError(
                f"data.train holds {train.images} images; evaluation.{name} needs at least {least}: add some, or leave "
                "it out"
            )
    return Shards(train.urls, held_out.urls)


def _check_classes(experiment: Experiment, train: Survey, held_out: Survey) -> None:
    """Compare the classes of both splits with those of the prior, and with the metrics that need classes."""
    classes, names = experiment.prior.classes, experiment.data.names
    asked = [f"prior.classes is {classes}"] if classes else []
    asked += [f"evaluation.{name} is set" for name in experiment.evaluation.class_metrics(classes)]
    if not asked:
        return
    if experiment.evaluation.cas_steps and not classes:
        raise UserError(
            f"evaluation.cas_steps is {experiment.evaluation.cas_steps}, but prior.classes is 0: samples have no "
            "classes, which a classifier learns: set cas_steps to 0"
        )
    reason = " and ".join(asked)
    for split, seen in (("train", train), ("validation", held_out)):
        if seen.mixed is not None:
            without, having = map(without_secrets, seen.mixed)
            raise UserError(
                f"{reason}, but of data.{split} {without!r} has no classes and {having!r} has: give all images a class"
            )
    _check_lists(experiment, reason)
    if not train.classes:
        raise UserError(
            f"{reason}, but no image of data.train has a class: looked for .cls, .index and .txt files, which hold "
            f"a number or a name of the class list, and in .json files for {experiment.data.label_field or 'label'!r}; "
            "set data.label_field or data.class_names (a JSON list), or prior.classes to 0 and metrics of classes to "
            "false"
        )
    listed = f"; the class list has {len(names)}" if names else ""
    for split, seen in (("train", train), ("validation", held_out)):
        if classes and seen.classes and seen.classes[-1] >= classes:
            raise UserError(
                f"prior.classes is {classes}, so that classes are 0 to {classes - 1}, but data.{split} has class "
                f"{seen.classes[-1]}{listed}: raise prior.classes to {seen.classes[-1] + 1}, or correct the classes"
            )
    beyond = [label for label in held_out.classes if label > train.classes[-1]]
    if beyond and train.whole:
        raise UserError(
            f"{reason}, but data.validation has class {beyond[-1]}, and the largest of data.train is "
            f"{train.classes[-1]}: leave those images out, or add training images of that class"
        )
    metrics = experiment.evaluation.class_metrics(classes)
    if metrics and not held_out.classes:
        raise UserError(
            f"evaluation.{metrics[0]} is set, but no image of data.validation has a class: give them classes, or set "
            "it to false or 0"
        )
    if metrics and train.whole and len(train.classes) < 2:
        raise UserError(
            f"evaluation.{metrics[0]} is set, but all images of data.train are of class {train.classes[0]}; telling "
            "classes apart needs at least 2: set it to false or 0"
        )


def _check_lists(experiment: Experiment, reason: str) -> None:
    """Compare the class lists beside the shards of both splits: folders of other classes are numbered otherwise."""
    data = experiment.data
    if data.class_names:
        return
    here, there = data.names, replace(data, train=data.validation).names
    for number, (name, other) in enumerate(zip(here, there, strict=False)):
        if name != other:
            raise UserError(
                f"{reason}, but class {number} is {name!r} beside data.train and {other!r} beside data.validation, as "
                f"their {CLASSES} say: make the shards of both from folders of the same classes"
            )


def stem(name: str) -> str:
    """A shard's name without what says that it is a tar file."""
    return name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")


def shard_names(urls: list[str]) -> list[str]:
    """A name for each shard: its file's, and of those that share one, as much of the path as tells them apart.

    Raises:
        UserError: the same shard twice.
    """
    paths = [without_query(url).rstrip("/") for url in urls]
    taken = Counter(paths)
    if twice := [without_secrets(url) for url, path in zip(urls, paths, strict=True) if taken[path] > 1]:
        raise UserError(f"one split names the same shard twice: {twice[0]!r}; leave it out once")
    names = [""] * len(paths)
    alike = list(range(len(paths)))
    for parts in itertools.count(1):
        for i in alike:
            names[i] = "-".join(part for part in paths[i].split("/")[-parts:] if part)
        stems = Counter(map(stem, names))
        alike = [i for i in alike if stems[stem(names[i])] > 1]
        if not alike:
            return names
        if all(parts > paths[i].count("/") for i in alike):
            shown = ", ".join(without_secrets(urls[i]) for i in alike)
            raise UserError(f"shards of one split have names that cannot be told apart: {shown}; rename one of them")
    raise AssertionError("counting does not end")
