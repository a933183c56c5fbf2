"""The actor that holds a trained pair, draws samples and judges the prior; and its work, cut into pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import bld_core
from bld_core.diffusion.bound import Bound
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.latents.reader import PackedCodes, open_latents
from bld_core.noise import uniform
from bld_core.storage import files
from cluster.config.experiment import Experiment

_CODES_AT_ONCE = 256


@dataclass(frozen=True)
class Draw:
    """Piece of work: draw the samples `first_index`, `first_index` + 1, ...; `labels` has one for each, or is None."""

    sampling: SamplingConfig
    labels: list[int] | None
    count: int
    first_index: int
    seed: int


@dataclass(frozen=True)
class Show:
    """Piece of work: show `states` states of the process of each of the first samples, one for each label."""

    sampling: SamplingConfig
    labels: list[int]
    states: int
    seed: int


@dataclass(frozen=True)
class Judge:
    """Piece of work: the likelihood bound of the held-out codes `start`, ..., `stop` - 1.

    Attributes:
        sampling: the steps that it is the bound of; None takes all that the prior has.
        start: number of the first code.
        stop: number of the one after the last; fewer codes are there where the data set is smaller.
    """

    sampling: SamplingConfig | None
    start: int
    stop: int


def draws(sampling: SamplingConfig, labels: list[int] | None, total: int, size: int, seed: int) -> list[Draw]:
    """Samples 0, ..., `total` - 1 in pieces of `size`."""
    return [
        Draw(sampling, None if labels is None else labels[start : start + size], min(size, total - start), start, seed)
        for start in range(0, total, size)
    ]


def judges(sampling: SamplingConfig | None, total: int) -> list[Judge]:
    """The bound of held-out codes 0, ..., `total` - 1 in pieces about equal, none of them of a single code."""
    count = -(-total // _CODES_AT_ONCE)
    return [Judge(sampling, n * total // count, (n + 1) * total // count) for n in range(count)]


def balanced_labels(total: int, classes: int) -> list[int] | None:
    """Balanced classes: sample i is of class i mod classes; None without classes."""
    return [i % classes for i in range(total)] if classes else None


def drawn_labels(counts: Sequence[int], total: int, seed: int) -> list[int]:
    """Classes by their frequencies: that of sample i is a function of (seed, i) and the counts of the classes."""
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    u = uniform(seed, "sample labels", torch.arange(total), 1)[:, 0].double()
    return torch.searchsorted(ends, u * ends[-1], right=True).tolist()


class Sampler:
    """An actor that holds the trained pair; the latents are those of the experiment's folder."""

    def __init__(self, experiment: Experiment) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.generator = bld_core.load(experiment.folder, experiment.cluster.device)

    def draw(self, piece: Draw | Show) -> Tensor:
        """The images, uint8 (count, H, W, channels); or their states, uint8 (count, states, H, W, channels)."""
        settings = asdict(piece.sampling)
        if isinstance(piece, Show):
            return self.generator.process(piece.labels, piece.states, seed=piece.seed, **settings)
        place = {"seed": piece.seed, "first_index": piece.first_index, "batch_size": piece.count}
        return self.generator.sample(piece.count, labels=piece.labels, **place, **settings)

    def judge(self, piece: Judge) -> Bound:
        """The bound."""
        prior, device = self.generator.prior, self.generator.device
        assert prior is not None, "the bound is that of a finished prior"
        codes, labels = self._held_out.part(slice(piece.start, piece.stop), device)
        return prior.model.bound(prior.network, codes, labels, self.experiment.seed, piece.sampling, piece.start)

    @functools.cached_property
    def _held_out(self) -> PackedCodes:
        return open_latents(files.join(self.experiment.folder, "latents"), "validation").read()
