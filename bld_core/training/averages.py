"""Exponential moving average of weights, the network that is evaluated and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averaged copies of a module's parameters; plain copies of its buffers, which follow rules of their own.

    The decay warms up as (1 + step) / (10 + step), so that early averages forget the initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move every average towards the current weights; `step` counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current, parameters = module.state_dict(), dict(module.named_parameters())
        averages: list[Tensor] = []
        targets: list[Tensor] = []
        for name, average in self.weights.items():
            if name in parameters:
                averages.append(average)
                targets.append(current[name])
            else:
                average.copy_(current[name])
        get_ema_multi_avg_fn(decay)(averages, targets, step)  # one fused pass over all tensors
