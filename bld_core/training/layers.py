"""Layers one after the other: what both networks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Layers(nn.Sequential):
    """Layers one after the other; with `checkpointing`, training keeps none of their inner activations."""

    checkpointing: bool = False

    def forward(self, input: Tensor, *others: Tensor) -> Tensor:  # noqa: A002  # named as its parent's
        """The layers of `input`; each gets `others`, too."""
        x = input
        for layer in self:
            if self.checkpointing and x.requires_grad:
                x = checkpoint(layer, x, *others, use_reentrant=False, preserve_rng_state=False)  # no layer draws
            else:
                x = layer(x, *others)
        return x
