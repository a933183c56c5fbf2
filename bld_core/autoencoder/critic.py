"""The critic of Eq. 2's adversarial term: a PatchGAN discriminator.

Shapes: x_BCHW images, about [-1, 1]; its map is (B, 1, h, w) of logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bld_core.autoencoder.losses import LossConfig
from bld_core.errors import UserError
from bld_core.training.replicas import rank_and_world, sum_over_replicas

_DECAY = 0.99  # of the averages, a step (Tseng et al. 2021)


class PatchCritic(nn.Module):
    """PatchGAN discriminator (Isola et al. 2017): one logit for each patch, above 0 for "real".

    4 x 4 convolutions with LeakyReLU(0.2): `layers` of stride 2, one of stride 1, one to the logits. GroupNorm stands
    in for BatchNorm: batch statistics would tie an image's score to the rest of its batch, and so to the number of
    workers that the batch is split over. Convolutions start at N(0, 0.02), biases at 0.

    Attributes:
        averages: with `config.lecam`, float32 (2,): moving averages of its logits of images and of reconstructions.
    """

    averages: Tensor

    def __init__(self, config: LossConfig, image_channels: int) -> None:
        super().__init__()
        self.layers = config.critic_layers
        width = config.critic_channels
        body: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.critic_layers + 1):
            wider = config.critic_channels * min(2**level, 8)
            stride = 2 if level < config.critic_layers else 1
            body += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        body.append(nn.Conv2d(width, 1, 4, padding=1))
        self.body = nn.Sequential(*body)
        for layer in body:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        if config.lecam:
            self.register_buffer("averages", torch.zeros(2))

    @torch.no_grad()
    def follow(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Move the averages towards the means of a batch, over all replicas; not of one that is not finite."""
        means = sum_over_replicas(torch.stack([real_logits.mean(), fake_logits.mean()])) / rank_and_world()[1]
        means = torch.where(means.isfinite(), means, self.averages)
        self.averages.lerp_(means, 1 - _DECAY)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """*Logits* (B, 1, H / 2^layers - 2, W / 2^layers - 2) of images (B, channels, H, W), about [-1, 1].

        Raises:
            UserError: the images are too small to leave a logit.
        """
        smallest = 3 * 2**self.layers
        if min(x_BCHW.shape[2:]) < smallest:
            raise UserError(
                f"the critic got images of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels; its {self.layers} layers need "
                f"at least {smallest} x {smallest}: lower `critic_layers`, or set `adversarial` to 0"
            )
        return self.body(x_BCHW)
