"""What stage 1 minimises, as a function of (state, batch)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.feature_distance import FeatureDistance
from bld_core.autoencoder.losses import (
    LossConfig,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
    lecam_term,
)
from bld_core.autoencoder.network import Autoencoder
from bld_core.autoencoder.perceptual import Perceptual
from bld_core.data.tensors import to_float
from bld_core.noise import uniform
from bld_core.training.loop import Batch, TrainState


class AutoencoderObjective:
    """Eq. 2 through drawn bits: a weighted sum of reconstruction, perceptual and adversarial terms."""

    def __init__(
        self,
        losses: LossConfig,
        code_shape: tuple[int, int, int],
        seed: int,
        perceptual: Perceptual | FeatureDistance | None = None,
        *,
        fade: int = 0,
    ) -> None:
        """The draws are keyed on (seed, global sample index); `perceptual` is there where `losses` weighs it.

        With `fade` > 0 the noise of a draw fades out over so many steps: uniforms go to 1/2, and draws to the mode.
        """
        self.losses = losses
        self.code_size = math.prod(code_shape)
        self.seed = seed
        self.perceptual = perceptual
        self.fade = fade

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """The terms and "loss", their weighted sum; "critic" is the critic's own loss.

        Terms come without their weights, except those of the bottleneck, which weighs its own, and the critic's loss,
        which has the LeCam term in it.
        """
        losses = self.losses
        x = to_float(batch.data)
        u = uniform(self.seed, "autoencoder draw", batch.sample_index, self.code_size)
        if self.fade:
            u = 0.5 + max(0.0, 1 - state.step / self.fade) * (u - 0.5)
        x_hat, latent_terms = state(x, u)
        x_hat = x_hat.float()
        if "entropy" in latent_terms:
            latent_terms["entropy"] = _ramp(state.step, losses.entropy_ramp) * latent_terms["entropy"]
        terms: dict[str, Tensor] = {}
        loss = x_hat.new_zeros(())
        if losses.l1:
            terms["l1"] = F.l1_loss(x_hat, x)
            loss = loss + losses.l1 * terms["l1"]
        if losses.mse:
            terms["mse"] = F.mse_loss(x_hat, x)
            loss = loss + losses.mse * terms["mse"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.distance(x, x_hat).mean()
            loss = loss + losses.perceptual * terms["perceptual"]
        if state.critic is not None and state.step >= losses.adversarial_start:
            loss = loss + self._adversarial(state, state.critic, x, x_hat, loss, terms)
        loss = loss + sum(latent_terms.values())
        return {"loss": loss, **terms, **latent_terms}

    def _adversarial(
        self, state: TrainState, critic: TrainState, x: Tensor, x_hat: Tensor, loss: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """The weighted adversarial term; adds it, its weight and the critic's loss to `terms`."""
        terms["adversarial"] = hinge_generator_loss(critic.with_constant_weights(x_hat).float())
        assert isinstance(state.module, Autoencoder), "stage 1 trains an autoencoder"
        limit = self.losses.adversarial_limit
        terms["adaptive"] = adaptive_weight(loss, terms["adversarial"], state.module.last_layer, limit)
        real, fake = critic(torch.cat([x, x_hat.detach()])).float().chunk(2)
        terms["critic"] = hinge_critic_loss(real, fake)
        if self.losses.lecam:
            assert isinstance(critic.module, PatchCritic), "the critic of stage 1"
            terms["lecam"] = lecam_term(real, fake, *critic.module.averages.clone())
            terms["critic"] = terms["critic"] + self.losses.lecam * terms["lecam"]
            critic.module.follow(real, fake)
        weight = self.losses.adversarial * _ramp(
            state.step - self.losses.adversarial_start, self.losses.adversarial_ramp
        )
        return weight * terms["adaptive"] * terms["adversarial"]


def _ramp(steps: int, length: int) -> float:
    """Rises linearly from 0 to 1 over `length` steps."""
    return min(1.0, (steps + 1) / (length + 1))
