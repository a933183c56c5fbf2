"""Bernoulli quantizer (Section 3.1): logits to bits, with a straight-through gradient.

Shapes: B images, c bits, an H x W grid. logits_BCHW are log-odds of a 1; y their sigmoid; z the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bld_core.training.replicas import rank_and_world, sum_over_replicas


def quantize(logits: Tensor, u: Tensor | None = None) -> Tensor:
    """Eq. 1: z ~ Bernoulli(y), y = sigmoid(logits); z_st = stop_gradient(z) + y - stop_gradient(y).

    Args:
        logits: any shape.
        u: uniforms in [0, 1) of the same shape, which decide the draw; None takes the mode, y > 1/2.

    Returns:
        Bits, exactly 0.0 or 1.0, shaped like logits; their gradient is that of y.
    """
    y = torch.sigmoid(logits)
    z = (y > 0.5 if u is None else u < y).to(y.dtype)
    return z + (y - y.detach())  # the bracket is exactly 0, so the value stays binary


def entropy_term(logits_BCHW: Tensor, *, synchronize: bool = False) -> Tensor:
    """Mean H(y) - mean over channels of H(mean y), in nats: bits that are sure of each image and balanced over images.

    Args:
        logits_BCHW: float32.
        synchronize: take "mean y" over the equal batches of all replicas; the mean of their gradients is then that of
            the whole batch.

    Returns:
        A scalar in [-ln 2, 0]: -ln 2 where every bit is sure and balanced, 0 where it says nothing of its image.
    """
    y = torch.sigmoid(logits_BCHW)
    each = y * nn.functional.softplus(-logits_BCHW) + (1 - y) * nn.functional.softplus(logits_BCHW)
    usage = y.mean((0, 2, 3))
    if synchronize:
        whole = sum_over_replicas(usage.detach().clone()) / rank_and_world()[1]
        usage = whole + (usage - usage.detach())
    usage = usage.clamp(1e-6, 1 - 1e-6)  # at 0 and 1 the slope of the entropy is infinite
    return each.mean() - (torch.special.entr(usage) + torch.special.entr(1 - usage)).mean()


class Bottleneck(nn.Module):
    """What stands between encoder and decoder: (features_BCHW, u or None) -> (latent_BCHW, its weighted loss terms).

    Attributes:
        inputs: channels that it takes.
        outputs: channels that it gives.
    """

    inputs: int
    outputs: int


class BernoulliBottleneck(Bottleneck):
    """Bits: drawn with the uniforms u, or the mode without them (Eq. 1).

    With `entropy` > 0 there is a loss term "entropy" = entropy * `entropy_term`: the entropy penalty of lookup-free
    quantization (Yu et al. 2024, MAGVIT-v2), bit by bit.

    Args:
        bits: c, channels in and out.
        entropy: weight of the entropy term; 0 computes none.
        draw: whether uniforms decide the bits; without, the mode is taken all the same.
    """

    def __init__(self, bits: int, entropy: float = 0.0, *, draw: bool = True) -> None:
        super().__init__()
        if entropy < 0:
            raise ValueError(
                f"entropy of a Bernoulli bottleneck is {entropy}; a weight must be 0 (no such term) or more"
            )
        self.inputs = self.outputs = bits
        self.entropy = entropy
        self.draw = draw

    def forward(self, features_BCHW: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, c, H, W) -> bits of the same shape and dtype, 0 or 1, and the entropy term if it has a weight."""
        logits = features_BCHW.float()
        z = quantize(logits, u if self.draw else None).to(features_BCHW.dtype)
        if self.entropy == 0:
            return z, {}
        synchronize = self.training and torch.is_grad_enabled()
        return z, {"entropy": self.entropy * entropy_term(logits, synchronize=synchronize)}
