"""The actor that holds a trained pair, draws samples and measures the bound; and its work, cut into pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import bld_core
from bld_core.diffusion.bound import Bound
from bld_core.diffusion.process import CodeBatch
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.generator import Generator
from bld_core.latents.reader import Latents, PackedCodes
from bld_core.noise import uniform
from bld_core.trained import load_prior
from cluster.config.experiment import Experiment

_CODES_AT_ONCE = 256


@dataclass(frozen=True)
class Draw:
    """Piece of work: draw the samples `first_index`, `first_index` + 1, ...

    Attributes:
        sampling: how.
        labels: the class of each, or None.
        count: how many.
        first_index: of the first.
        seed: of the noise.
        prior: experiment folder of the prior; empty takes the actor's own.
    """

    sampling: SamplingConfig
    labels: list[int] | None
    count: int
    first_index: int
    seed: int
    prior: str = ""


@dataclass(frozen=True)
class DrawProcess:
    """Piece of work: draw `states` states of the reverse process of each of the first samples, one for each label."""

    sampling: SamplingConfig
    labels: list[int]
    states: int
    seed: int


@dataclass(frozen=True)
class MeasureBound:
    """Piece of work: measure the likelihood bound on the held-out codes `start`, ..., `stop` - 1.

    Attributes:
        sampling: the steps that it is the bound of; None takes all that the prior has.
        start: number of the first code.
        stop: number of the one after the last; fewer codes are there where the data set is smaller.
        prior: experiment folder of the prior; empty takes the actor's own.
    """

    sampling: SamplingConfig | None
    start: int
    stop: int
    prior: str = ""


def draw_pieces(sampling: SamplingConfig, labels: list[int] | None, total: int, size: int, seed: int) -> list[Draw]:
    """Samples 0, ..., `total` - 1 in pieces of `size`."""
    return [
        Draw(sampling, None if labels is None else labels[start : start + size], min(size, total - start), start, seed)
        for start in range(0, total, size)
    ]


def bound_pieces(sampling: SamplingConfig | None, total: int) -> list[MeasureBound]:
    """The bound of held-out codes 0, ..., `total` - 1 in pieces about equal, none of them of a single code."""
    count = -(-total // _CODES_AT_ONCE)
    return [MeasureBound(sampling, n * total // count, (n + 1) * total // count) for n in range(count)]


def balanced_labels(total: int, classes: int) -> list[int] | None:
    """Balanced classes: sample i is of class i mod classes; None without classes."""
    return [i % classes for i in range(total)] if classes else None


def drawn_labels(counts: Sequence[int], total: int, seed: int) -> list[int]:
    """Classes by their frequencies: that of sample i is a function of (seed, i) and the counts of the classes."""
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    u = uniform(seed, "sample labels", torch.arange(total), 1)[:, 0].double()
    return torch.searchsorted(ends, u * ends[-1], right=True).tolist()


class Sampler:
    """An actor that holds a trained pair, and the codes that its prior is measured on.

    Args:
        experiment: whose autoencoder it takes, and whose prior unless a piece of work names another.
        held_out: the validation part of the latents, where bounds are to be measured.
    """

    def __init__(self, experiment: Experiment, held_out: Latents | None = None) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.generator = bld_core.load(experiment.folder, experiment.cluster.device)
        self._prior_folder = experiment.folder
        self._latents = held_out

    def use_prior(self, folder: str) -> None:
        """Take the prior of an experiment's folder in place of the one at hand; empty means the experiment's own."""
        folder = folder or self.experiment.folder
        if folder != self._prior_folder:
            autoencoder, device = self.generator.autoencoder, str(self.generator.device)
            self.generator = Generator(autoencoder, load_prior(folder, autoencoder, device), device)
            self._prior_folder = folder

    def draw(self, piece: Draw | DrawProcess) -> Tensor:
        """The images, uint8 (count, H, W, channels); or their states, uint8 (count, states, H, W, channels)."""
        settings = asdict(piece.sampling)
        if isinstance(piece, DrawProcess):
            return self.generator.process(piece.labels, piece.states, seed=piece.seed, **settings)
        self.use_prior(piece.prior)
        which = {"seed": piece.seed, "first_index": piece.first_index, "batch_size": piece.count}
        return self.generator.sample(piece.count, labels=piece.labels, **which, **settings)

    def bound(self, piece: MeasureBound) -> Bound:
        """The bound."""
        self.use_prior(piece.prior)
        prior, device = self.generator.prior, self.generator.device
        assert prior is not None, "the bound is that of a finished prior"
        codes = CodeBatch.numbered(*self._held_out.part(slice(piece.start, piece.stop), device), piece.start)
        return prior.model.bound(prior.network, codes, self.experiment.seed, piece.sampling)

    @functools.cached_property
    def _held_out(self) -> PackedCodes:
        assert self._latents is not None, "whoever asks for bounds hands in the codes"
        return self._latents.read()
