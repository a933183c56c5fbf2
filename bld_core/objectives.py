"""The two objectives: what stage 1 and stage 2 minimise, as functions of (network, batch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.autoencoder import to_float
from bld_core.diffusion import DiffusionConfig, diffusion_loss
from bld_core.noise import uniform
from bld_core.prior import drop_labels
from bld_core.training import Batch


@dataclass(frozen=True)
class AutoencoderObjective:
    """Eq. 2, its reconstruction term: mean absolute error through drawn bits, images in [-1, 1].

    Attributes:
        code_shape: (h, w, c).
        seed: of the draws, which are keyed on the global sample index.
    """

    code_shape: tuple[int, int, int]
    seed: int

    def __call__(self, autoencoder: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = to_float(batch.data)
        u = uniform(self.seed, "autoencoder draw", batch.sample_index, math.prod(self.code_shape))
        loss = F.l1_loss(autoencoder(x, u), x)
        return {"loss": loss, "l1": loss}


class PriorObjective:
    """Eq. 13 on cached codes, with label dropout."""

    def __init__(self, diffusion: DiffusionConfig, label_dropout: float, seed: int) -> None:
        self.diffusion = diffusion
        self.schedule = diffusion.make_schedule()
        self.label_dropout = label_dropout
        self.seed = seed

    def __call__(self, prior: nn.Module, batch: Batch) -> dict[str, Tensor]:
        labels = drop_labels(batch.labels, batch.sample_index, self.label_dropout, self.seed)
        z_0 = batch.data.float()
        return diffusion_loss(prior, z_0, labels, batch.sample_index, self.schedule, self.diffusion, self.seed)
