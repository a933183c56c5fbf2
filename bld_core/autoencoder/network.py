"""The binary autoencoder (Section 3): image -> c bits on a (H/k, W/k) grid -> image.

Shapes: x_BHWC uint8 images; x_BCHW float images in [-1, 1]; a, z_BCHW logits and bits of the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.autoencoder.quantizer import Bottleneck
from bld_core.errors import UserError
from bld_core.training.layers import Layers

_HEAD_CHANNELS = 64
_LOUD = 6.0  # makes the first logits about 1 in size: bits half sure, not coin flips in which the image is lost


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The binary autoencoder (Section 3.1).

    Args:
        bits: c, the number of bits at each position of the code.
        latent: "binary" is the paper's; the other two are what it compares with (Table 4): "vector" takes the c numbers
            of each position to the nearest entry of a codebook, "continuous" keeps c/2 real numbers.
        codes: how training takes binary codes: "sample" draws each bit (the paper's), "mode" takes its likelier value,
            "fade" goes from the one to the other, step by step.
        entries: size of the codebook of `latent: vector`.
        patch: side of the squares of pixels that the first level takes as its positions (space to depth, and back after
            the decoder): 1, 2 or 4. 1 is the paper's; 2 has no level at full resolution, where most time goes.
        channels: feature channels of the first level, before its multiplier.
        multipliers: channel multiplier of each level; each level after the first halves the resolution.
        blocks: residual blocks a level.
        decoder_channels: `channels` of the decoder; 0 has as many as the encoder.
        decoder_blocks: `blocks` of the decoder; 0 has as many as the encoder.
        attention: down-samplings (`patch`, twice that, ...) at which every residual block is followed by
            self-attention; if there are any, the middle of both networks has one, too. 16 is a map of 16 x 16 for
            images of 256 pixels.
    """

    bits: int = 32
    latent: Literal["binary", "vector", "continuous"] = "binary"
    codes: Literal["sample", "mode", "fade"] = "sample"
    entries: int = 1024
    patch: int = 1
    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2
    decoder_channels: int = 0
    decoder_blocks: int = 0
    attention: list[int] = field(default_factory=lambda: [16])

    def __post_init__(self) -> None:
        for name in ("bits", "channels", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1", self)
        for name in ("decoder_channels", "decoder_blocks"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be 0 (as the encoder) or more", self)
        if self.patch not in (1, 2, 4):
            raise UserError(f"`patch` is {self.patch}; it must be 1 (each pixel), 2 or 4", self)
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(
                f"`multipliers` is {self.multipliers}; it needs one whole number of 1 or more for each level", self
            )

        if self.latent == "continuous" and self.bits % 2:
            raise UserError(f"`bits` is {self.bits}; a continuous latent has half as many: make it even", self)
        if self.entries < 1:
            raise UserError(f"`entries` is {self.entries}; a codebook has at least 1", self)
        known = [self.patch * 2**level for level in range(len(self.multipliers))]
        if not set(self.attention) <= set(known):
            raise UserError(
                f"`attention` is {self.attention}; {len(known)} levels have the down-samplings {known}", self
            )

    @property
    def downsampling(self) -> int:
        """k, the side of the image patch behind one code position."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def code_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of the code of a square image.

        Raises:
            UserError: the image does not divide into whole patches, or the code into whole bytes.
        """
        k = self.downsampling
        if image_size < k or image_size % k:
            raise UserError(
                f"`image_size` is {image_size}; the {len(self.multipliers)} levels of `multipliers`, on a `patch` of "
                f"{self.patch}, need a multiple of {k}: change one of them",
                self,
            )
        h = image_size // k
        if h * h * self.bits % 8:
            raise UserError(
                f"a code of {h} x {h} x {self.bits} bits is not whole bytes; make `bits` a multiple of 8", self
            )
        return h, h, self.bits

    def code_bits(self, image_size: int) -> float | None:
        """Bits that the code of an image takes: h w c, or h w log2(entries); None of a continuous latent."""
        h, w, c = self.code_shape(image_size)
        match self.latent:
            case "binary":
                return h * w * c
            case "vector":
                return h * w * math.log2(self.entries)
            case "continuous":
                return None


def _norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of 4 channels or more: a group of one channel would lose how bright an image is."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels, eps=1e-6)


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


class Attention(nn.Module):
    """Self-attention over all positions by PyTorch's fused kernel, heads of 64 channels, beside a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // _HEAD_CHANNELS)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W)
        return x + self.out(mixed)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: no checkerboard."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(config: AutoencoderConfig, width: int) -> list[nn.Module]:
    attention: list[nn.Module] = [Attention(width)] if config.attention else []
    return [ResidualBlock(width, width), *attention, ResidualBlock(width, width)]


def _level(config: AutoencoderConfig, level: int, width: int) -> list[nn.Module]:
    """The residual blocks of one resolution, whichever way the image is going."""
    layers: list[nn.Module] = []
    for _ in range(config.blocks):
        layers.append(ResidualBlock(width, config.channels * config.multipliers[level]))
        width = config.channels * config.multipliers[level]
        if config.patch * 2**level in config.attention:
            layers.append(Attention(width))
    return layers


def _encoder(config: AutoencoderConfig, image_channels: int, outputs: int) -> Layers:
    """Psi: images to what the bottleneck takes."""
    width = config.channels
    layers: list[nn.Module] = [] if config.patch == 1 else [nn.PixelUnshuffle(config.patch)]
    layers.append(nn.Conv2d(image_channels * config.patch**2, width, 3, padding=1))
    for level, multiplier in enumerate(config.multipliers):
        if level:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        layers += _level(config, level, width)
        width = config.channels * multiplier
    layers += [*_middle(config, width), _norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
    return Layers(*layers, nn.Conv2d(width, outputs, 1))


def _decoder(config: AutoencoderConfig, image_channels: int, inputs: int) -> Layers:
    """Phi: what the bottleneck gives to images. The first layer sums the code book vectors of the 1 bits (Fig. 5)."""
    config = replace(
        config,
        channels=config.decoder_channels or config.channels,
        blocks=config.decoder_blocks or config.blocks,
    )
    width = config.channels * config.multipliers[-1]
    layers: list[nn.Module] = [nn.Conv2d(inputs, width, 1), nn.Conv2d(width, width, 3, padding=1)]
    layers += _middle(config, width)
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        layers += _level(config, level, width)
        width = config.channels * multiplier
        if level:
            layers.append(Upsample(width))
    layers += [_norm(width), nn.SiLU(), nn.Conv2d(width, image_channels * config.patch**2, 3, padding=1)]
    return Layers(*layers, *([] if config.patch == 1 else [nn.PixelShuffle(config.patch)]))


class Autoencoder(nn.Module):
    """Encoder, bottleneck and decoder of images of any size that the down-sampling divides."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, bottleneck: Bottleneck) -> None:
        """The bottleneck is the one that `config.latent` names: see `make_autoencoder`."""
        super().__init__()
        self.bottleneck = bottleneck
        self.encoder = _encoder(config, image_channels, self.bottleneck.inputs)
        self.decoder = _decoder(config, image_channels, self.bottleneck.outputs)
        if config.latent == "binary":
            with torch.no_grad():
                for weights in self.encoder[-1].parameters():
                    weights.mul_(_LOUD)

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution, by which the adversarial term is balanced."""
        last = [layer for layer in self.decoder if isinstance(layer, nn.Conv2d)][-1]
        return last.weight

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Code *logits* (B, c, H/k, W/k) of images in [-1, 1]; their sigmoid is the probability of a 1.

        What comes out for a `latent` that is not binary is what its bottleneck takes.
        """
        return self.encoder(x_BCHW)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images (B, channels, H, W), about [-1, 1], of bits (B, c, H/k, W/k)."""
        return self.decoder(z_BCHW)

    def forward(self, x_BCHW: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction through the bottleneck, and the bottleneck's own loss terms, weighted.

        Args:
            x_BCHW: images in [-1, 1].
            u: uniforms, (B, c*h*w), that decide the draw; the mode without them.
        """
        features = self.encode(x_BCHW)
        z_BCHW, terms = self.bottleneck(features, None if u is None else u.view_as(features))
        return self.decode(z_BCHW), terms
