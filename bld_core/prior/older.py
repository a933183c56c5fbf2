"""Priors of target z_prev from before their output was read as that of z0: still loaded, sampled and measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bld_core.diffusion.process import DiffusionConfig, own_evidence, reverse_flip_coefficients
from bld_core.diffusion.schedule import NoiseSchedule
from bld_core.prior.binary import BinaryModel
from bld_core.prior.transformer import Prior, PriorConfig

_CERTAIN = 1e-12  # the least probability of a flip that an output is read as: its logit stays finite


class SingleStepPrior(Prior):
    """A network whose weights say P(z_s != z_t | z_t) for s = t - 1, the sigmoid of their output; it gives evidence."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int, schedule: NoiseSchedule) -> None:
        super().__init__(config, tokens, bits)
        self.schedule = schedule

    def forward(self, z_BNC: Tensor, time: Tensor, labels: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Evidence logits e, (B, N, C): the exact reverse step, r A + (1 - r) B = sigmoid(output), solved for r.

        The left side lies in [B, A]; an output outside counts as the nearer end. Arguments and errors are those of
        `Prior.forward`.
        """
        output = super().forward(z_BNC, time, labels, known)
        t = (time * self.schedule.steps).round().long()
        k_s, k_t = (self.schedule.signal(level, z_BNC) for level in (t - 1, t))
        A, B = reverse_flip_coefficients(k_s, k_t)
        logit_r = torch.logit((torch.sigmoid(output.double()) - B) / (A - B), eps=_CERTAIN)
        return (logit_r - own_evidence(k_t, logit_r)).to(output.dtype)


class SingleStepModel(BinaryModel):
    """Binary diffusion with such a network, which takes any grid as others do."""

    def __init__(self, config: PriorConfig, diffusion: DiffusionConfig, tokens: int, bits: int) -> None:
        super().__init__(config, replace(diffusion, target="flip"), tokens, bits)

    def network(self) -> nn.Module:
        """A network for the weights."""
        return SingleStepPrior(self.config, *self.shape, self.process.schedule)
