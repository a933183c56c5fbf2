"""The replicas of a training run: who and how many they are, and what they agree on."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

ReducePrecision = Literal["float32", "bfloat16"]


def rank_and_world() -> tuple[int, int]:
    """(rank, world) of this training replica; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_replicas(x: Tensor) -> Tensor:
    """Sum x over all replicas, in place: every replica must call it, and all get the same bits. Returns x."""
    if rank_and_world()[1] > 1:
        distributed.all_reduce(x)
    return x


def reduce_gradients_in(module: nn.Module, precision: ReducePrecision) -> nn.Module:
    """Have replicas send their gradients in this precision; a module without replicas has none to send. Returns it."""
    if precision == "bfloat16" and isinstance(module, DistributedDataParallel):
        # Under another name: by its own DistributedDataParallel asks for CUDA, though gloo sums bfloat16, too.
        hook: Any = lambda group, bucket: bf16_compress_hook(group, bucket)  # noqa: E731  # pyright: ignore
        module.register_comm_hook(None, hook)
    return module


def gradients_laid_out_as_weights(module: nn.Module) -> None:
    """Give gradients the strides of their weights also where a dimension of size 1 makes both name the same memory.

    Beside feature maps with their channels innermost (those of images of one channel always are), the gradient of a
    convolution of one pixel has the strides (C, 1, C, C), its weights (C, 1, 1, 1). DistributedDataParallel takes them
    for different layouts and warns that they cost speed.
    """
    for weights in module.parameters():
        if 1 in weights.shape and weights.requires_grad:
            weights.register_hook(partial(_relabelled, weights.stride()))


def _relabelled(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient with other strides, if they name the same memory."""
    pairs = zip(gradient.shape, gradient.stride(), strides, strict=True)
    same = all(size == 1 or mine == other for size, mine, other in pairs)
    return gradient.as_strided(gradient.shape, strides) if same else gradient
