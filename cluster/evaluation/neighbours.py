"""The nearest training images of samples: whether a model has learnt its images by heart."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from bld_core.data.images import first_images
from bld_core.data.pictures import fitting, grid
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack
from cluster.config.experiment import Experiment
from cluster.data.decoding import ShardDecoder
from cluster.evaluation.references import Space, load_extractor
from cluster.runtime import map_on_actors

_SHOWN = 10  # samples of the picture
QUERIES = 32  # samples, and as many held-out images, whose nearest distance counts


class Nearest(NamedTuple):
    """The nearest training images of some images, nearest first: distances (Q, k), images uint8 (Q, k, H, W, C)."""

    distances: Tensor
    images: Tensor

    def merge(self, other: Nearest, count: int) -> Nearest:
        """The `count` nearest of both; of equally near ones those of this part."""
        distances = torch.cat([self.distances, other.distances], 1)
        images = torch.cat([self.images, other.images], 1)
        kept = distances.argsort(dim=1, stable=True)[:, :count]
        return Nearest(distances.gather(1, kept), images[torch.arange(len(images))[:, None], kept])


class Finder:
    """An actor that looks for the nearest images in several shards at a time, and keeps k images for each of Q.

    Args:
        experiment: whose training images.
        space: in whose features; None compares pixels.
        queries: uint8 (Q, H, W, channels).
        count: k.
    """

    def __init__(self, experiment: Experiment, space: Space | None, queries: Tensor, count: int) -> None:
        experiment.cluster.limit_threads()
        self.count, self.size = count, experiment.latents.batch_size
        self.extractor = load_extractor(experiment, space) if space is not None else None
        self.decoder = ShardDecoder(experiment)
        self.turn = threading.Lock()
        self.queries = self._vectors(queries)

    def _vectors(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, channels) -> float64 (B, F): whole numbers, so products of pixels are exact."""
        if self.extractor is None:
            return images.flatten(1).double()
        return torch.cat([self.extractor(some).cpu() for some in images.split(self.size)]).double()

    def find(self, url: str) -> Nearest | None:
        """The nearest images of a shard; None where it has none."""
        found: Nearest | None = None
        for batch in self.decoder.batches(url, Skipped()):
            some = stack(batch)
            with self.turn:
                x, y = self.queries, self._vectors(some)
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            distances, index = squares.clamp(min=0).sqrt().topk(min(self.count, len(some)), largest=False)
            part = Nearest(distances, some[index])
            found = part if found is None else found.merge(part, self.count)
        return found


@dataclass(frozen=True)
class Neighbours:
    """What was found.

    Attributes:
        space: by what they are near: "pixels", or "features of ..." an extractor.
        metrics: the mean distance of samples to their nearest training image by that of held-out images: about 1 for a
            model that has learnt no image by heart, near 0 for one that has.
        picture: a sample in each row, and its nearest training images, nearest first.
    """

    space: str
    metrics: dict[str, float]
    picture: Image


def find_neighbours(
    experiment: Experiment, shards: Sequence[str], samples: Tensor, spaces: Sequence[Space]
) -> Neighbours:
    """The training images nearest to samples, in the first of `spaces`, or by their pixels where there is none.

    Args:
        experiment: its first held-out images are compared with.
        shards: of training images.
        samples: uint8 (B, H, W, channels), of which the first 32 count.
        spaces: where there are extractors; the classifier is trained already.
    """
    data, config = experiment.data, experiment.evaluation
    samples = samples[:QUERIES]
    held_out = stack(first_images(data.validation, data, QUERIES))
    space = spaces[0] if spaces else None
    arguments = (experiment, space, torch.cat([samples, held_out]), config.neighbours)
    cluster, found = experiment.cluster, None
    calls = cluster.shards_at_once
    for part in map_on_actors(Finder, arguments, "find", shards, cluster, "neighbours", calls, decodes=True):
        if part is not None:
            found = part if found is None else found.merge(part, config.neighbours)
    assert found is not None, "a prior was trained on these images"
    nearest = found.distances[:, 0]
    drawn, real = float(nearest[: len(samples)].mean()), float(nearest[len(samples) :].mean())
    name = space.metric_name("neighbour_ratio") if space is not None else "neighbour_ratio_pixels"
    shown = fitting(data.image_size, _SHOWN, 1 + found.images.shape[1])
    rows = torch.cat([samples[:, None], found.images[: len(samples)]], 1)[:shown]
    metrics = {name: drawn / real} if real > 0 else {}  # held-out images that are all trained on say nothing
    by = f"features of {space.name}" if space is not None else "pixels"
    return Neighbours(by, metrics, grid(rows.flatten(0, 1), rows.shape[1]))
