"""How healthy the bits of a code are: sure, used, different from one another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bld_core.autoencoder.quantizer import quantize

_ENTROPY_STEPS = 2.0**24  # entropies are summed as multiples of 2^-24 bits: exact, in any order, up to 2^29 positions


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class CodeHealth:
    """How the bits of a code are used, from sums that merge: the same to the last digit however the work is split.

    Attributes:
        count: positions seen, over all images.
        ones: float64 (c,): positions where the mode of each bit is 1.
        pairs: float64 (c, c): positions where both bits are 1.
        entropy: float64 (c,): sum of H(y), in units of 2^-24 bits.
    """

    count: int = 0
    ones: Tensor = field(default_factory=_nothing)
    pairs: Tensor = field(default_factory=_nothing)
    entropy: Tensor = field(default_factory=_nothing)

    @torch.no_grad()
    def update(self, logits_BCHW: Tensor) -> None:
        """Add the logits of some images, (B, c, H, W)."""
        logits_CN = logits_BCHW.float().transpose(0, 1).flatten(1)
        z, y = quantize(logits_CN).double(), logits_CN.double().sigmoid()
        bits = (torch.special.entr(y) + torch.special.entr(1 - y)) / math.log(2)
        entropy = bits.mul(_ENTROPY_STEPS).round().sum(1)
        self.merge(CodeHealth(z.shape[1], z.sum(1).cpu(), (z @ z.T).cpu(), entropy.cpu()))

    def merge(self, other: CodeHealth) -> None:
        """Add another worker's part."""
        self.count += other.count
        self.ones = self.ones + other.ones
        self.pairs = self.pairs + other.pairs
        self.entropy = self.entropy + other.entropy

    @property
    def usage(self) -> Tensor:
        """float64 (c,): the share of positions where the mode of each bit is 1."""
        return self.ones / self.count

    @property
    def correlation(self) -> float:
        """Mean |Pearson correlation| between different bits; stuck bits have none and are left out; 0 below two."""
        covariance = self.count * self.pairs - torch.outer(self.ones, self.ones)  # times count^2: whole numbers, exact
        alive = covariance.diagonal() > 0
        n = int(alive.sum())
        if n < 2:
            return 0.0
        covariance = covariance[alive][:, alive]
        variance = covariance.diagonal()
        correlation = (covariance / torch.outer(variance, variance).sqrt()).abs().fill_diagonal_(0)
        return float(correlation.sum()) / (n * (n - 1))

    def metrics(self) -> dict[str, float]:
        """Four metrics; NaN over nothing.

        Returns:
            bit_entropy: mean of H(y), 0..1 bits: 0 where the encoder is sure of every bit.
            bit_usage_mean: mean of `usage`; 1/2 is balanced.
            dead_bits: share of bits whose usage is below 0.01 or above 0.99.
            bit_correlation: `correlation`; 0 where the bits say different things, as far as pairs can tell.
        """
        if self.count == 0:
            return dict.fromkeys(("bit_entropy", "bit_usage_mean", "dead_bits", "bit_correlation"), math.nan)
        usage = self.usage
        return {
            "bit_entropy": float(self.entropy.mean()) / (_ENTROPY_STEPS * self.count),
            "bit_usage_mean": float(usage.mean()),
            "dead_bits": float(((usage < 0.01) | (usage > 0.99)).double().mean()),
            "bit_correlation": self.correlation,
        }
