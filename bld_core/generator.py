"""A trained pair, autoencoder and prior, ready for use without Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import Autoencoder, AutoencoderConfig
from bld_core.autoencoder.quantizer import quantize
from bld_core.data.images import to_float, to_uint8
from bld_core.diffusion.sampling import Known, SamplingConfig
from bld_core.errors import UserError
from bld_core.noise import key_of
from bld_core.prior.binary import BinaryModel
from bld_core.prior.model import PriorModel, trained_model
from bld_core.storage import files
from bld_core.training.checkpoint import CONFIG, load_weights, read_model_config
from bld_core.training.inference import for_inference
from bld_core.training.loop import Precision

AUTOENCODER = "autoencoder/final"
PRIOR = "prior/final"
_PIXELS_AT_ONCE = 1 << 22  # in one pass of the autoencoder: 64 images of 256 x 256, 4 of 1024 x 1024


def check_binary(config: Mapping[str, Any]) -> None:
    """Whether an autoencoder has bits, given its config.json.

    Raises:
        UserError: its latent is another: it is there for comparison, and can only reconstruct.
    """
    latent = config["autoencoder"]["latent"]
    if latent != "binary":
        raise UserError(
            f"the trained autoencoder {config['hash'][:12]} has a {latent} latent, which has no bits: it is there for "
            "comparison, and can only reconstruct; train one with autoencoder.latent binary under another --name"
        )


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
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images (B, H, W, channels) -> what is left of them behind the latent, without its noise; the same."""
        return torch.cat([to_uint8(self.network(to_float(some))[0]) for some in images.split(self._at_once)])

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
    """A finished stage 2: the network, in evaluation mode, its config.json, and the model that it names."""

    network: nn.Module
    config: dict[str, Any]
    model: PriorModel


def load_autoencoder(folder: str, device: str = "cpu") -> TrainedAutoencoder:
    """Open `<folder>/autoencoder/final`, whatever its latent; see `bld_core.load` for the errors."""
    location = files.join(folder, AUTOENCODER)
    config = read_model_config(location)
    network = make_autoencoder(AutoencoderConfig(**config["autoencoder"]), config["channels"])
    load_weights(location, network, config["hash"], device)
    return TrainedAutoencoder(network, config)


def load_prior(folder: str, autoencoder: TrainedAutoencoder, device: str = "cpu") -> TrainedPrior:
    """Open `<folder>/prior/final`.

    Raises:
        UserError: it was trained on the codes of another autoencoder.
    """
    location = files.join(folder, PRIOR)
    config = read_model_config(location)
    if config["autoencoder_hash"] != autoencoder.config["hash"]:
        raise UserError(
            f"the prior in {location!r} was trained on codes of autoencoder {config['autoencoder_hash'][:12]}, but the "
            f"autoencoder there is {autoencoder.config['hash'][:12]}: encode and train the prior again with --fresh"
        )
    model = trained_model(config, autoencoder.code_shape)
    network = model.network()
    load_weights(location, network, config["hash"], device)
    return TrainedPrior(network, config, model)


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
        self._copies: dict[tuple[Precision, bool], tuple[TrainedPrior, TrainedAutoencoder]] = {}

    @property
    def classes(self) -> int:
        """The number of classes that can be asked for; 0 for an unconditional prior."""
        return self.prior.config["prior"]["classes"] if self.prior else 0

    def encode(self, images: Tensor) -> Tensor:
        """The likeliest bits of images (the mode, y > 1/2)."""
        self._check_images(images)
        check_binary(self.autoencoder.config)
        return self.autoencoder.encode(images.to(self.device))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the autoencoder and back: with bits, `decode(encode(images))`."""
        self._check_images(images)
        return self.autoencoder.reconstruct(images.to(self.device))

    def _check_images(self, images: Tensor) -> None:
        size, channels = self.autoencoder.config["image_size"], self.autoencoder.config["channels"]
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (size, size, channels):
            raise UserError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; this autoencoder takes uint8 "
                f"(B, {size}, {size}, {channels})"
            )

    def decode(self, bits: Tensor) -> Tensor:
        """The images of bits."""
        check_binary(self.autoencoder.config)
        shape = self.autoencoder.code_shape
        if bits.ndim != 4 or tuple(bits.shape[1:]) != shape:
            raise UserError(f"bits have shape {tuple(bits.shape)}; this autoencoder takes (B, {shape})")
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
            settings: fields of SamplingConfig (steps, spacing, grid, temperature, guidance, final, precision, compile)
                that differ from those stored with the prior; steps or spacing put a stored grid out of use.

        Returns:
            uint8 (count, H, W, channels).

        Raises:
            UserError: no prior, an unknown class, or a setting out of bounds.
        """
        count = len(labels) if count is None and labels is not None else count
        if count is None or count < 1 or (labels is not None and len(labels) != count):
            given = None if labels is None else len(labels)
            raise UserError(f"count is {count} with {given} labels; ask for at least 1 image, and one label for each")
        index = first_index + torch.arange(count)
        return self._draw(index, labels, None, seed, batch_size, settings)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        count: int = 1,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> Tensor:
        """Complete images from their known pixels, `count` times each.

        A token is known only if its whole patch is. Unknown pixels are never looked at: before encoding, those of an
        image are filled with the mean colour of its known ones.

        Args:
            images: uint8 (B, H, W, channels).
            mask: bool, (B, H, W), or (1, H, W) for all: True where a pixel is known.
            count: completions of each image.
            labels: the class of each image, -1 for none; None asks for no class.
            seed: of the noise. Completion j of image i is a function of (seed, first_index + i, j), the image's known
                pixels and the settings; where nothing is known, completion 0 is the image that `sample` draws.
            first_index: index of the first image.
            batch_size: completions in one pass.
            settings: fields of SamplingConfig, as in `sample`, and inpainting, resample.

        Returns:
            uint8 (B, count, H, W, channels), the known pixels byte for byte as they were.

        Raises:
            UserError: no prior or an autoregressive one, an unknown class, images or a mask of another shape, or a
                setting out of bounds.
        """
        h, w, _ = self.autoencoder.code_shape
        if mask.dtype != torch.bool or mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
            raise UserError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)} for images {tuple(images.shape)}; it must be "
                "torch.bool of shape (B, H, W), or (1, H, W) for all images, True where a pixel is known"
            )
        if count < 1 or (labels is not None and len(labels) != len(images)):
            raise UserError(
                f"count is {count}, with {None if labels is None else len(labels)} labels for {len(images)} images; "
                "ask for at least 1 completion, and give one label for each image"
            )
        mask = mask.expand(len(images), -1, -1)
        bits = self.encode(_fill_unknown(images, mask))
        known = Known(bits.flatten(1, 2).float(), known_tokens(mask, h, w).to(self.device))
        row = torch.arange(len(images)).repeat_interleave(count)
        completion = torch.arange(count).repeat(len(images))
        index = first_index + row + (completion << 32)
        chosen = None if labels is None else [labels[i] for i in row.tolist()]
        drawn = self._draw(
            index, chosen, Known(*(part[row.to(self.device)] for part in known)), seed, batch_size, settings
        )
        return torch.where(mask[:, None, ..., None], images[:, None], drawn.view(len(images), count, *images.shape[1:]))

    def outpaint(
        self, images: Tensor, width: int, *, labels: Sequence[int] | None = None, seed: int = 0, **settings: Any
    ) -> Tensor:
        """Continue images to the right, window after window; half of each window is what is there already.

        Args:
            images: uint8 (B, H, W, channels), of the size that the autoencoder takes, or wider.
            width: of the result in pixels.
            labels: the class of each image, -1 for none; None asks for no class.
            seed: of the noise. Image i is a function of (seed, i), its pixels and the settings.
            settings: as in `inpaint`.

        Returns:
            uint8 (B, H, width, channels), whose left side is `images`, byte for byte.

        Raises:
            UserError: as in `inpaint`, or images that are already as wide or narrower than one window.
        """
        size, done = self.autoencoder.config["image_size"], images.shape[2]
        if not size <= done < width:
            raise UserError(
                f"images are {done} pixels wide and the result is to be {width}; images must be at least {size} wide, "
                "the autoencoder's own size, and less than the result"
            )
        canvas = F.pad(images, (0, 0, 0, width - done))
        while done < width:
            left = min(done - size // 2, width - size)
            window = canvas[:, :, left : left + size]
            mask = (torch.arange(left, left + size) < done).expand(1, size, size)
            key = key_of(seed, "outpainting", left)
            canvas[:, :, left : left + size] = self.inpaint(window, mask, labels=labels, seed=key, **settings)[:, 0]
            done = left + size
        return canvas

    def process(
        self, labels: Sequence[int], states: int, *, seed: int = 0, first_index: int = 0, **settings: Any
    ) -> Tensor:
        """Images of the denoising process (Fig. 3): some of the states z_T, ..., z_0 of each sample, decoded.

        Args:
            labels: the class of each sample, -1 for none.
            states: how many states to show, at equal numbers of steps, the first and the last among them; at least 2,
                and all of them where there are fewer.
            seed: of the noise; the last states are the images that `sample` draws.
            first_index: index of the first sample.
            settings: as in `sample`.

        Returns:
            uint8 (B, states, H, W, channels).

        Raises:
            UserError: as in `sample`, fewer than 2 states, or a prior that is no binary diffusion.
        """
        prior, config = self._settle(labels, settings)
        model = prior.model
        if not isinstance(model, BinaryModel) or states < 2:
            raise UserError(
                f"{states} states of the process asked for, of a prior whose prior.model is "
                f"{prior.config['prior']['model']}; ask for at least 2, of a binary one"
            )
        index = (first_index + torch.arange(len(labels))).to(self.device)
        chosen = torch.tensor(labels, device=self.device)
        count = model.steps(config)
        shown = torch.linspace(0, count, min(states, count + 1)).round().int().tolist()
        prior, autoencoder = self._networks(prior, config)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            process = model.states(prior.network, chosen, index, config, seed)
            frames = [self._images(autoencoder, z) for n, z in enumerate(process) if n in shown]
        return torch.stack(frames, dim=1)

    def _settle(self, labels: Sequence[int] | None, settings: dict[str, Any]) -> tuple[TrainedPrior, SamplingConfig]:
        """The prior, and how it is to draw: its stored settings, changed by those given; the errors are `sample`'s."""
        if self.prior is None:
            raise UserError("this folder holds an autoencoder but no finished prior; train stage 2 before sampling")
        for label in labels or []:
            if not -1 <= label < self.classes:
                classes = f"0..{self.classes - 1}" if self.classes else "none, it is unconditional"
                raise UserError(f"class {label} asked for; the classes of this prior: {classes}")
        if settings.keys() & {"steps", "spacing"}:
            settings = {"grid": [], **settings}
        return self.prior, replace(SamplingConfig(**self.prior.config["sampling"]), **settings)

    def _draw(
        self,
        index: Tensor,
        labels: Sequence[int] | None,
        known: Known | None,
        seed: int,
        batch_size: int,
        settings: dict[str, Any],
    ) -> Tensor:
        """The images of codes drawn at `index`, a batch at a time; the errors are those of `sample`."""
        prior, config = self._settle(labels, settings)
        prior, autoencoder = self._networks(prior, config)
        parts: list[Tensor] = []
        for start in range(0, len(index), batch_size):
            some = slice(start, start + batch_size)
            chosen = None if labels is None else torch.tensor(labels[some], device=self.device)
            given = None if known is None else Known(known.z[some], known.mask[some])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                z = prior.model.sample(prior.network, chosen, index[some].to(self.device), config, seed, given)
                parts.append(self._images(autoencoder, z))
        return torch.cat(parts)

    def _images(self, autoencoder: TrainedAutoencoder, z_BNC: Tensor) -> Tensor:
        """Codes as tokens -> images, on the CPU."""
        return autoencoder.decode(z_BNC.view(-1, *autoencoder.code_shape)).cpu()

    def _networks(self, prior: TrainedPrior, config: SamplingConfig) -> tuple[TrainedPrior, TrainedAutoencoder]:
        """The pair that draws: itself, or a faster copy, made once."""
        precision, compiled = key = config.precision, config.compile
        if key == ("float32", False):
            return prior, self.autoencoder
        if key not in self._copies:
            autoencoder = copy.deepcopy(self.autoencoder.network)
            autoencoder.decoder = for_inference(autoencoder.decoder, precision, compiled=compiled)
            self._copies[key] = (
                replace(prior, network=for_inference(prior.network, precision, compiled=compiled)),
                replace(self.autoencoder, network=autoencoder),
            )
        return self._copies[key]


def known_tokens(mask_BHW: Tensor, h: int, w: int) -> Tensor:
    """A mask of pixels -> a mask of the h x w tokens, bool (B, h w): a token is known only if its whole patch is."""
    B, H, W = mask_BHW.shape
    return mask_BHW.reshape(B, h, H // h, w, W // w).all(dim=4).all(dim=2).flatten(1)


def _fill_unknown(images: Tensor, mask_BHW: Tensor) -> Tensor:
    """Images whose unknown pixels have the mean colour of their known ones; grey where nothing is known."""
    known = mask_BHW[..., None]
    count = known.sum(dim=(1, 2), keepdim=True)
    mean = torch.where(known, images, 0).sum(dim=(1, 2), keepdim=True) // count.clamp(min=1)
    return torch.where(known, images, torch.where(count > 0, mean, 128).to(torch.uint8))
