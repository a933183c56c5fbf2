"""A trained pair, autoencoder and prior, ready for use without Ray."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.errors import MissingError, UserError
from bld_core.precision import Precision, autocast, ieee_float32
from bld_core.prior.binary import BinaryModel
from bld_core.splitmix import key_of
from bld_core.trained import TrainedAutoencoder, TrainedPrior, has_prior, load_autoencoder, load_prior
from bld_core.training.inference import for_inference


def load_generator(folder: str, device: str = "cpu") -> Generator:
    """See `bld_core.load`."""
    autoencoder = load_autoencoder(folder, device)
    return Generator(autoencoder, load_prior(folder, autoencoder, device) if has_prior(folder) else None, device)


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
        return self.prior.record.prior.classes if self.prior else 0

    def encode(self, images: Tensor) -> Tensor:
        """The likeliest bits of images (the mode, y > 1/2)."""
        self._check_images(images)
        self.autoencoder.record.check_binary()
        return self.autoencoder.encode(images.to(self.device))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the autoencoder and back: with bits, `decode(encode(images))`."""
        self._check_images(images)
        return self.autoencoder.reconstruct(images.to(self.device))

    def _check_images(self, images: Tensor) -> None:
        size, channels = self.autoencoder.record.image_size, self.autoencoder.record.channels
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (size, size, channels):
            raise UserError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; this autoencoder takes uint8 "
                f"(B, {size}, {size}, {channels})"
            )

    def decode(self, bits: Tensor) -> Tensor:
        """The images of bits."""
        self.autoencoder.record.check_binary()
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
            settings: fields of SamplingConfig (steps, spacing, grid, temperature, guidance, guidance_interval, final,
                precision, compile) that differ from those stored with the prior; steps or spacing put a stored grid out
                of use.

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

        A token is known only if its whole patch is. Unknown pixels are never used: before encoding, those of an
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
        known = self.known(images, mask)
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
        size, done = self.autoencoder.record.image_size, images.shape[2]
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
        config, model = self.settle(labels, settings), None if self.prior is None else self.prior.model
        if not isinstance(model, BinaryModel) or states < 2:
            raise UserError(
                f"{states} states of the process asked for, of a prior whose model is "
                f"{self.prior and self.prior.record.prior.model}; ask for at least 2, of a binary one"
            )
        index = (first_index + torch.arange(len(labels))).to(self.device)
        chosen = torch.tensor(labels, device=self.device)
        count = model.steps(config)
        shown = torch.linspace(0, count, min(states, count + 1)).round().int().tolist()
        process = enumerate(self.states(SampleSpec(index, chosen, seed), config))
        return torch.stack([self.images(z, config) for n, z in process if n in shown], dim=1)

    def known(self, images: Tensor, mask: Tensor) -> Known:
        """What the known pixels of images, as those of `inpaint`, say of their codes; `mask` is bool (B, H, W)."""
        h, w, _ = self.autoencoder.code_shape
        bits = self.encode(_fill_unknown(images, mask))
        return Known(bits.flatten(1, 2).float(), known_tokens(mask, h, w).to(self.device))

    def states(self, samples: SampleSpec, config: SamplingConfig, known: Known | None = None) -> Iterator[Tensor]:
        """Codes on their way from noise to samples: what `sample` and `inpaint` draw with, for who batches himself.

        Args:
            samples: which to draw, on the device of the networks.
            config: how.
            known: what is given of each code.

        Yields:
            float 0/1 (B, h, w, c), on the device; the last are the samples. A prior that is no binary diffusion gives
            these alone.
        """
        assert self.prior is not None, "whoever has a configuration has a prior"
        prior, autoencoder = self._networks(self.prior, config)
        model, given = prior.model, (prior.network, samples, config, known)
        found = model.states(*given) if isinstance(model, BinaryModel) else (model.sample(*given) for _ in range(1))
        while True:
            with ieee_float32(), autocast(config.precision, self.device):  # not while others have their turn
                z = next(found, None)
            if z is None:
                return
            yield z.view(-1, *autoencoder.code_shape)

    def images(self, codes: Tensor, config: SamplingConfig) -> Tensor:
        """Codes (B, h, w, c) -> images, on the CPU, in the precision of the samples."""
        assert self.prior is not None, "whoever has a configuration has a prior"
        with ieee_float32(), autocast(config.precision, self.device):
            return self._networks(self.prior, config)[1].decode(codes).cpu()

    def settle(self, labels: Sequence[int] | None, settings: dict[str, Any]) -> SamplingConfig:
        """How the prior is to draw: its stored settings, changed by those given; the errors are `sample`'s."""
        if self.prior is None:
            raise MissingError(
                "this folder holds an autoencoder but no finished prior: train one on its codes first",
                stages=("prior",),
            )
        for label in labels or []:
            if not -1 <= label < self.classes:
                classes = f"0..{self.classes - 1}" if self.classes else "none, it is unconditional"
                raise UserError(f"class {label} asked for; the classes of this prior: {classes}")
        if settings.keys() & {"steps", "spacing"}:
            settings = {"grid": [], **settings}
        return replace(self.prior.record.sampling, **settings)

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
        config = self.settle(labels, settings)
        parts: list[Tensor] = []
        for rows in _batches(len(index), batch_size, alike=config.compile):
            chosen = (
                None if labels is None else torch.tensor([labels[row] for row in rows.tolist()], device=self.device)
            )
            given = None if known is None else Known(*(part[rows.to(self.device)] for part in known))
            samples = SampleSpec(index[rows].to(self.device), chosen, seed)
            [z] = deque(self.states(samples, config, given), maxlen=1)
            parts.append(self.images(z, config))
        return torch.cat(parts)[: len(index)]

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


def _batches(count: int, size: int, *, alike: bool) -> Sequence[Tensor]:
    """The rows 0..count-1 by batches; alike, a last one that is smaller is filled up with its last row.

    Each size that a compiled network meets is compiled anew. Fewer rows than one batch stay as few as they are.
    """
    filled = -count % size if alike and count > size else 0
    return torch.arange(count + filled).clamp(max=count - 1).split(size)


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
