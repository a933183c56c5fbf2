"""A trained pair, autoencoder and prior, ready for use without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bld_core import files
from bld_core.autoencoder import Autoencoder, AutoencoderConfig, to_float, to_uint8
from bld_core.checkpoint import CONFIG, load_weights, read_model_config
from bld_core.diffusion import DiffusionConfig
from bld_core.prior import Prior, PriorConfig
from bld_core.quantizer import quantize
from bld_core.sampling import SamplingConfig, sample_codes

AUTOENCODER = "autoencoder/final"
PRIOR = "prior/final"
_PIXELS_AT_ONCE = 1 << 22  # in one pass of the autoencoder: 64 images of 256 x 256, 4 of 1024 x 1024


@dataclass(frozen=True)
class TrainedAutoencoder:
    """A finished stage 1: the network, in evaluation mode, and its config.json."""

    network: Autoencoder
    config: dict[str, Any]

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        h, w, c = self.config["code_shape"]
        return h, w, c

    @property
    def _at_once(self) -> int:
        """Images in one pass: few where they are large."""
        return max(1, _PIXELS_AT_ONCE // self.config["image_size"] ** 2)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (B, H, W, channels) -> their likeliest codes, uint8 0/1 (B, h, w, c)."""
        logits = [self.network.encode(to_float(some)) for some in images.split(self._at_once)]
        return quantize(torch.cat(logits)).permute(0, 2, 3, 1).to(torch.uint8)

    @torch.no_grad()
    def decode(self, bits_BHWC: Tensor) -> Tensor:
        """Codes (B, h, w, c) of 0/1 -> uint8 images (B, H, W, channels)."""
        z_BCHW = bits_BHWC.float().permute(0, 3, 1, 2)
        return torch.cat([to_uint8(self.network.decode(z)) for z in z_BCHW.split(self._at_once)])


@dataclass(frozen=True)
class TrainedPrior:
    """A finished stage 2: the network, in evaluation mode, and its config.json."""

    network: Prior
    config: dict[str, Any]


def load_autoencoder(folder: str, device: str = "cpu") -> TrainedAutoencoder:
    """Open `<folder>/autoencoder/final`; see `bld_core.load` for the errors."""
    location = files.join(folder, AUTOENCODER)
    config = read_model_config(location)
    latent = config["autoencoder"]["latent"]
    if latent != "binary":
        raise ValueError(
            f"the autoencoder in {location!r} has a {latent} latent, which has no bits: it is there for comparison; "
            "train one with autoencoder.latent binary"
        )
    network = Autoencoder(AutoencoderConfig(**config["autoencoder"]), config["channels"])
    load_weights(location, network, config["hash"], device)
    return TrainedAutoencoder(network, config)


def load_prior(folder: str, autoencoder: TrainedAutoencoder, device: str = "cpu") -> TrainedPrior:
    """Open `<folder>/prior/final`.

    Raises:
        ValueError: it was trained on the codes of another autoencoder.
    """
    location = files.join(folder, PRIOR)
    config = read_model_config(location)
    if config["autoencoder_hash"] != autoencoder.config["hash"]:
        raise ValueError(
            f"the prior in {location!r} was trained on codes of autoencoder {config['autoencoder_hash'][:12]}, but the "
            f"autoencoder there is {autoencoder.config['hash'][:12]}: encode and train the prior again with --fresh"
        )
    h, w, c = autoencoder.code_shape
    network = Prior(PriorConfig(**config["prior"]), h * w, c)
    load_weights(location, network, config["hash"], device)
    return TrainedPrior(network, config)


def load_generator(folder: str, device: str = "cpu") -> Generator:
    """See `bld_core.load`."""
    autoencoder = load_autoencoder(folder, device)
    has_prior = files.exists(files.join(folder, PRIOR, CONFIG))
    return Generator(autoencoder, load_prior(folder, autoencoder, device) if has_prior else None, device)


class Generator:
    """Images <-> bits, and new images. Images are uint8 (B, H, W, channels); bits are uint8 0/1 (B, h, w, c)."""

    def __init__(self, autoencoder: TrainedAutoencoder, prior: TrainedPrior | None, device: str) -> None:
        self.autoencoder = autoencoder
        self.prior = prior
        self.device = torch.device(device)

    @property
    def classes(self) -> int:
        """The number of classes that can be asked for; 0 for an unconditional prior."""
        return self.prior.config["prior"]["classes"] if self.prior else 0

    def encode(self, images: Tensor) -> Tensor:
        """The likeliest bits of images (the mode, y > 1/2)."""
        size, channels = self.autoencoder.config["image_size"], self.autoencoder.config["channels"]
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (size, size, channels):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; this autoencoder takes uint8 "
                f"(B, {size}, {size}, {channels})"
            )
        return self.autoencoder.encode(images.to(self.device))

    def decode(self, bits: Tensor) -> Tensor:
        """The images of bits."""
        shape = self.autoencoder.code_shape
        if bits.ndim != 4 or tuple(bits.shape[1:]) != shape:
            raise ValueError(f"bits have shape {tuple(bits.shape)}; this autoencoder takes (B, {shape})")
        return self.autoencoder.decode(bits.to(self.device))

    def sample(
        self,
        count: int | None = None,
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> Tensor:
        """Draw new images.

        Args:
            count: how many; may be left out where labels are given.
            labels: the class of each image, -1 for none; None asks for no class.
            seed: of the noise. Image i is a function of (seed, first_index + i) and its settings.
            first_index: index of the first image, so that one set can be drawn in parts.
            batch_size: images in one pass.
            settings: fields of SamplingConfig (steps, spacing, temperature, guidance, final) that differ from
                those stored with the prior.

        Returns:
            uint8 (count, H, W, channels).

        Raises:
            ValueError: no prior, an unknown class, or a setting out of bounds.
        """
        if self.prior is None:
            raise ValueError("this folder holds an autoencoder but no finished prior; train stage 2 before sampling")
        count = len(labels) if count is None and labels is not None else count
        if count is None or count < 1 or (labels is not None and len(labels) != count):
            given = None if labels is None else len(labels)
            raise ValueError(f"count is {count} with {given} labels; ask for at least 1 image, and one label for each")
        for label in labels or ():
            if not -1 <= label < self.classes:
                known = f"0..{self.classes - 1}" if self.classes else "none, it is unconditional"
                raise ValueError(f"class {label} asked for; the classes of this prior: {known}")
        config = replace(SamplingConfig(**self.prior.config["sampling"]), **settings)
        diffusion = DiffusionConfig(**self.prior.config["diffusion"])
        schedule = diffusion.make_schedule()
        h, w, c = self.autoencoder.code_shape
        parts: list[Tensor] = []
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            index = first_index + torch.arange(start, start + size, device=self.device)
            chosen = None if labels is None else torch.tensor(labels[start : start + size], device=self.device)
            z = sample_codes(self.prior.network, (h * w, c), chosen, index, schedule, config, seed, diffusion.target)
            parts.append(self.decode(z.view(-1, h, w, c)).cpu())
        return torch.cat(parts)
