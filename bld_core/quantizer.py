"""Bernoulli quantizer (Section 3.1): logits to bits, with a straight-through gradient."""

from __future__ import annotations

import torch
from torch import Tensor


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
