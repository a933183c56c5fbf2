"""Continuous latent (Table 4, the real-valued rows): a Gaussian for each element, held near N(0, 1) by a little KL."""

from __future__ import annotations

import torch
from torch import Tensor

from bld_core.autoencoder.quantizer import Bottleneck
from bld_core.errors import UserError


def normal_from_uniform(u: Tensor) -> Tensor:
    """Standard normal noise by the inverse distribution function: float32 in [0, 1) -> float32, |value| < 5.5.

    Uniforms of 24 bits are moved to the middle of their interval of 2^-24: symmetric, and never 0 or 1.
    """
    return torch.special.ndtri(u.double() + 2.0**-25).float()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each element, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class GaussianBottleneck(Bottleneck):
    """A draw from N(mean, variance), reparameterised (Kingma and Welling 2014); the mean without uniforms.

    Its loss term is "kl" = weight * mean KL to N(0, 1) over all elements.

    Args:
        width: channels out; twice as many come in: means, then log-variances, which are clamped to [-30, 20].
        weight: of the KL term; a little, as in latent diffusion (Rombach et al. 2022), who weigh sums, not means.
    """

    def __init__(self, width: int, weight: float = 1e-6) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"weight of the KL of a Gaussian bottleneck is {weight}; it must be 0 or more")
        self.inputs, self.outputs = 2 * width, width
        self.weight = weight

    def forward(self, features_BCHW: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, 2 width, H, W) -> latent (B, width, H, W) of the same dtype, and {"kl"}.

        The uniforms u are shaped like the features; the noise is made from their first `width` channels.
        """
        mean, log_variance = features_BCHW.float().split(self.outputs, 1)
        log_variance = log_variance.clamp(-30, 20)
        latent = mean
        if u is not None:
            latent = mean + (0.5 * log_variance).exp() * normal_from_uniform(u[:, : self.outputs])
        return latent.to(features_BCHW.dtype), {"kl": self.weight * gaussian_kl(mean, log_variance).mean()}
