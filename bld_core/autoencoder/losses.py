"""The weights of Eq. 2, its adversarial term, and the adaptive weight; perceptual terms have files of their own.

Shapes: x_BCHW images, y_BCHW reconstructions, both in [-1, 1] (y only about); a critic's map is (B, 1, h, w) of logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.errors import UserError
from bld_core.storage.weights import VGG16
from bld_core.training.replicas import rank_and_world, sum_over_replicas

PerceptualNetwork = Literal["vgg16", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Eq. 2 as a weighted collection; a term of weight 0 is not computed, and what it needs is not loaded.

    Args:
        l1: weight of the mean absolute error.
        mse: weight of the mean squared error.
        perceptual: weight of the perceptual term.
        perceptual_network: LPIPS by "vgg16", the paper's, which needs its weights and the extra losses; or the plain
            distance in features of "efficientnet_lite0", whose weights come with the extra features.
        vgg_weights: local file of torchvision's VGG16 ImageNet weights; empty downloads it.
        vgg_sha256: sha256 of that file in lower-case hex, or its first digits, at least 8.
        adversarial: weight of the generator's hinge loss, beside its adaptive weight: 0.5 in latent diffusion (Rombach
            et al. 2022), 0.1 in TiTok (Yu et al. 2024), which has no adaptive one.
        adversarial_start: step from which the adversarial term counts; before it the weight is 0. Late is usual: the
            step 50,001 in latent diffusion.
        adversarial_ramp: steps from there over which its weight rises from 0, while the critic is new.
        adversarial_limit: upper clamp of the adaptive weight.
        lecam: weight of the LeCam regulariser in the critic's loss: 0.001 in TiTok.
        critic_channels: feature channels of the critic's first layer.
        critic_layers: convolutions of the critic that halve the resolution; 3 see patches of 70 x 70 pixels.
        critic_learning_rate: step size of the critic's optimizer.
        entropy: weight of the quantizer's entropy regulariser: surer bits, each of them used half of the time.
        entropy_ramp: steps over which that weight rises from 0, so that bits find their meaning before they are sure.
    """

    l1: float = 1.0
    mse: float = 0.0
    perceptual: float = 0.0
    perceptual_network: PerceptualNetwork = "vgg16"
    vgg_weights: str = ""
    vgg_sha256: str = VGG16.sha256
    adversarial: float = 0.0
    adversarial_start: int = 0
    adversarial_ramp: int = 0
    adversarial_limit: float = 1e4
    lecam: float = 0.0
    critic_channels: int = 64
    critic_layers: int = 3
    critic_learning_rate: float = 2e-4
    entropy: float = 0.0
    entropy_ramp: int = 0

    def __post_init__(self) -> None:
        for name in (
            *("l1", "mse", "perceptual", "adversarial", "adversarial_start", "adversarial_ramp", "lecam"),
            *("entropy", "entropy_ramp"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be 0 or more, and finite", self)
        for name in ("adversarial_limit", "critic_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be above 0, and finite", self)
        for name in ("critic_channels", "critic_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1", self)
        if self.l1 == self.mse == 0:
            raise UserError("`l1` and `mse` are both 0; one must be above 0, or nothing ties pixels to the image", self)
        VGG16.check_settings(self.vgg_weights, self.vgg_sha256)


def hinge_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Eq. 2, what the critic minimises: (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2; a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Eq. 2, the adversarial term of the autoencoder: -E[fake]; a scalar."""
    return -fake_logits.mean()


def lecam_term(real_logits: Tensor, fake_logits: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021): E[max(0, real - fake average)^2] + E[max(0, real average - fake)^2].

    It holds the critic near what it has said on average of the other kind, which few images would drive it away from.

    Args:
        real_logits: the critic's, of images; any shape.
        fake_logits: of reconstructions.
        real_average: scalar, what it has said of images before, on average.
        fake_average: of reconstructions.

    Returns:
        Scalar, at least 0.
    """
    return F.relu(real_logits - fake_average).square().mean() + F.relu(real_average - fake_logits).square().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, limit: float) -> Tensor:
    """The adversarial weight: ||d rec / d last|| / (||d adv / d last|| + 1e-4), clamped to [0, limit].

    Where torch.distributed runs with several workers, both gradients are first averaged over all of them, so every
    replica uses the weight of the global batch. It is then a collective call: every worker makes it, at the same step.

    Args:
        reconstruction_loss: scalar, the mean over this worker's share of the batch; all terms but the adversarial one.
        adversarial_loss: scalar, likewise: `hinge_generator_loss`, before any weight.
        last_layer: weight of the decoder's last layer, on which both losses depend.
        limit: upper clamp.

    Returns:
        Scalar without gradient. Both graphs are kept for the backward pass, and no `.grad` is touched. It costs a
        backward pass through the perceptual network and one through the critic, beside those of the step itself.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
            for loss in (reconstruction_loss, adversarial_loss)
        ]
    )
    gradients = sum_over_replicas(gradients) / rank_and_world()[1]
    reconstruction, adversarial = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return (reconstruction / (adversarial + 1e-4)).clamp(0, limit).detach()
