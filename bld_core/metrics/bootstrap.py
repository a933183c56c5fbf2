"""The standard error of a Frechet distance, by a bootstrap that streams (Poisson bootstrap: Chamandy et al. 2012)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.noise import uniform

_MOST = 11  # a sample comes more often less than once in 10^8 draws: finer than 24 random bits


def poisson_counts(seed: int, index: Tensor, replicates: int) -> Tensor:
    """How often each sample comes in each replicate, int64 (B, replicates): Poisson(1), by (seed, index, replicate).

    Args:
        seed: of the experiment.
        index: int64 (B,), of the samples.
        replicates: how many; those that are there do not change as more are asked for.
    """
    shares = torch.tensor([math.exp(-1) / math.factorial(count) for count in range(_MOST)], dtype=torch.float64)
    return torch.searchsorted(shares.cumsum(0), uniform(seed, "bootstrap", index, replicates).double(), right=True)


class FrechetBootstrap:
    """Moments of resampled samples, one set for each replicate: 8 F^2 bytes each, however many samples there are.

    Args:
        replicates: how many; 0 gives no error.
        seed: of the resampling.
    """

    def __init__(self, replicates: int, seed: int) -> None:
        self._moments = [FeatureMoments() for _ in range(replicates)]
        self._seed = seed

    def update(self, features: Tensor, first_index: int) -> None:
        """Add the feature vectors, (B, F), of samples `first_index`, `first_index` + 1, ..."""
        if self._moments:
            index = first_index + torch.arange(len(features))
            counts = poisson_counts(self._seed, index, len(self._moments))
            for moments, count in zip(self._moments, counts.T, strict=True):
                moments.update(features.cpu().repeat_interleave(count, 0))

    def standard_error(self, reference: FeatureMoments) -> float:
        """The deviation (n - 1) of the replicates' distances to `reference`; needs at least 2 replicates."""
        distances = [frechet_distance(reference, moments) for moments in self._moments]
        return float(torch.tensor(distances, dtype=torch.float64).std())
