"""Networks that learn nothing any more, as they run fastest."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from bld_core.precision import Precision

Network = TypeVar("Network", bound=nn.Module)


def for_inference(network: Network, precision: Precision, *, compiled: bool, graphs: bool = True) -> Network:
    """A copy of a network for passes without gradients.

    Under autocast to bfloat16 the weights of matrix products and convolutions would be rounded again in every pass; in
    the copy they are rounded once, and all else stays float32: the copy's results are those of autocast, bit for bit.

    Args:
        network: left as it is.
        precision: of the copy's passes; for "bfloat16" they must run under autocast to it.
        compiled: compile the copy at its first pass of each shape.
        graphs: compiled for a GPU, with CUDA graphs: these belong to one thread.
    """
    network = copy.deepcopy(network)
    if precision == "bfloat16":
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
    if compiled:
        graphs = graphs and next(network.parameters()).is_cuda
        network.compile(mode="reduce-overhead" if graphs else "default", dynamic=False)
    return network
