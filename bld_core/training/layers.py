"""Layers one after the other: what both networks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SHAPES = 64  # of layers and what they take, in all networks of a process: a large autoencoder has 20


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


def compile_layers(module: nn.Module) -> None:
    """Compile the layers of a network that are made of others, its blocks, each by itself; those alike are so once.

    DistributedDataParallel sends the gradients of a block while the one before it goes backwards: a network that is
    compiled as a whole has them all at the end. A last convolution stays as it is, so that a gradient of it alone, as
    the adversarial weight takes, enters no compiled block.
    """
    import torch._dynamo  # takes seconds

    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    for layers in module.modules():
        if isinstance(layers, Layers):
            for layer in layers:
                if any(True for _ in layer.children()):
                    layer.compile(dynamic=False)
