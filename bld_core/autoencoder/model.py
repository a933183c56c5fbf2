"""The three autoencoders behind one seam: binary latents, and what Table 4 compares them with."""

from __future__ import annotations

from bld_core.autoencoder.baselines.continuous import GaussianBottleneck
from bld_core.autoencoder.baselines.vector import VectorBottleneck
from bld_core.autoencoder.network import Autoencoder, AutoencoderConfig
from bld_core.autoencoder.quantizer import BernoulliBottleneck, Bottleneck


def make_autoencoder(config: AutoencoderConfig, image_channels: int, entropy: float = 0.0) -> Autoencoder:
    """A freshly initialised autoencoder with the bottleneck that `config.latent` names.

    Args:
        config: the networks and their latent.
        image_channels: 1 (grey) or 3 (RGB).
        entropy: weight of the entropy term of binary codes, which counts in training alone.
    """
    return Autoencoder(config, image_channels, _make_bottleneck(config, entropy))


def _make_bottleneck(config: AutoencoderConfig, entropy: float) -> Bottleneck:
    match config.latent:
        case "binary":
            return BernoulliBottleneck(config.bits, entropy, draw=config.codes != "mode")
        case "vector":
            return VectorBottleneck(config.entries, config.bits)
        case "continuous":
            return GaussianBottleneck(config.bits // 2)
