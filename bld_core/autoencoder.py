"""The binary autoencoder (Section 3): image -> c bits on a (H/k, W/k) grid -> image.

Shapes: x_BHWC uint8 images; x_BCHW float images in [-1, 1]; a, z_BCHW logits and bits of the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.quantizer import quantize


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The binary autoencoder (Section 3.1).

    Args:
        bits: c, the number of bits at each position of the code.
        channels: feature channels at full resolution.
        multipliers: channel multiplier of each level; each level after the first halves the resolution.
        blocks: residual blocks a level in the encoder; the decoder has one more.
    """

    bits: int = 32
    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("bits", "channels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"autoencoder.multipliers is {self.multipliers}; it needs one whole number of 1 or more for each level"
            )

    @property
    def downsampling(self) -> int:
        """k, the side of the image patch behind one code position."""
        return 2 ** (len(self.multipliers) - 1)

    def code_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of the code of a square image.

        Raises:
            ValueError: the image does not divide into whole patches, or the code into whole bytes.
        """
        k = self.downsampling
        if image_size < k or image_size % k:
            raise ValueError(
                f"data.image_size is {image_size}; {len(self.multipliers)} levels of autoencoder.multipliers need a "
                f"multiple of {k}: change one of the two"
            )
        h = image_size // k
        if h * h * self.bits % 8:
            raise ValueError(
                f"a code of {h} x {h} x {self.bits} bits is not whole bytes; make autoencoder.bits a multiple of 8"
            )
        return h, h, self.bits


def to_float(images_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, channels) -> float32 (B, channels, H, W) in [-1, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Float (B, channels, H, W) in [-1, 1] -> uint8 (B, H, W, channels): clamped, then rounded."""
    return x_BCHW.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a skip connection."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(channels_in),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            _norm(channels_out),
            nn.SiLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: no checkerboard."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _encoder(config: AutoencoderConfig, image_channels: int) -> nn.Sequential:
    """Psi: images to code logits."""
    width = config.channels
    layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1)]
    for level, multiplier in enumerate(config.multipliers):
        if level:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        for _ in range(config.blocks):
            layers.append(ResidualBlock(width, config.channels * multiplier))
            width = config.channels * multiplier
    layers += [ResidualBlock(width, width), _norm(width), nn.SiLU(), nn.Conv2d(width, config.bits, 1)]
    return nn.Sequential(*layers)


def _decoder(config: AutoencoderConfig, image_channels: int) -> nn.Sequential:
    """Phi: bits to images. The first layer sums the code book vectors of the bits that are 1 (Fig. 5)."""
    width = config.channels * config.multipliers[-1]
    layers: list[nn.Module] = [nn.Conv2d(config.bits, width, 1), ResidualBlock(width, width)]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for _ in range(config.blocks + 1):
            layers.append(ResidualBlock(width, config.channels * multiplier))
            width = config.channels * multiplier
        if level:
            layers.append(Upsample(width))
    layers += [_norm(width), nn.SiLU(), nn.Conv2d(width, image_channels, 3, padding=1)]
    return nn.Sequential(*layers)


class BinaryAutoencoder(nn.Module):
    """Encoder, Bernoulli quantizer and decoder of images of any size that the down-sampling divides."""

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        self.encoder = _encoder(config, image_channels)
        self.decoder = _decoder(config, image_channels)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Code *logits* (B, c, H/k, W/k) of images in [-1, 1]; their sigmoid is the probability of a 1."""
        return self.encoder(x_BCHW)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images (B, channels, H, W), about [-1, 1], of bits (B, c, H/k, W/k)."""
        return self.decoder(z_BCHW)

    def forward(self, x_BCHW: Tensor, u: Tensor | None = None) -> Tensor:
        """Reconstruction through quantized bits: drawn with the uniforms u, or the mode without them."""
        logits = self.encode(x_BCHW)
        return self.decode(quantize(logits, None if u is None else u.view_as(logits)))
