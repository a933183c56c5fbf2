"""Inpainting: one picture of images, what is known of them, and several completions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bld_core.data.images import BadImage, ImageConfig, decode, first_images
from bld_core.data.pictures import grid, mask_of_box, mask_of_picture, png
from bld_core.data.tensors import stack
from bld_core.errors import UserError
from bld_core.storage import files
from cluster.config.artifacts import open_pair
from cluster.config.experiment import Experiment
from cluster.lineage import lineage
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import Sampler
from cluster.stages import open_stage

_HIDDEN = 128


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """One picture of completed images.

    Args:
        image: image file to complete, a path or any fsspec URL; empty takes held-out images of the experiment.
        samples: held-out images to complete, by their position in the validation shards, one row each.
        mask: picture file of the mask, of the images' size: white is known, black is made anew; empty takes the box.
        box: left, top, right, bottom in pixels of the part that is made anew; empty takes the middle, half of each
            side.
        completions: how many of each image.
        label: class of the completions; -1 asks for none.
        seed: of the noise; another seed gives other completions.
    """

    image: str = ""
    samples: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    mask: str = ""
    box: list[int] = field(default_factory=list)
    completions: int = 6
    label: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.completions < 1:
            raise UserError(f"inpaint.completions is {self.completions}; it must be at least 1")
        if not self.image and (not self.samples or min(self.samples) < 0):
            raise UserError(f"inpaint.samples is {self.samples}; name at least one image by its position, from 0 on")
        if self.mask and self.box:
            raise UserError(
                f"inpaint.mask and inpaint.box {self.box} both say what is made anew; leave one of them out"
            )
        if self.box and len(self.box) != 4:
            raise UserError(f"inpaint.box is {self.box}; it must be [left, top, right, bottom] in pixels")


class Piece(NamedTuple):
    """Piece of work: complete one image; `number` is its index among the images."""

    number: int
    image: Tensor
    mask: Tensor
    settings: InpaintConfig


class Inpainter(Sampler):
    """An actor that holds the trained pair."""

    def complete(self, piece: Piece) -> Tensor:
        """The completions of one image, uint8 (completions, H, W, channels)."""
        settings = piece.settings
        labels = None if settings.label < 0 else [settings.label]
        sampling = asdict(self.experiment.sampling)
        return self.generator.inpaint(
            piece.image[None],
            piece.mask[None],
            count=settings.completions,
            labels=labels,
            seed=settings.seed,
            first_index=piece.number,
            **sampling,
        )[0]


def _read(setting: str, url: str) -> bytes:
    """A file that a setting names.

    Raises:
        UserError: it is not there, or not for this user to read.
    """
    try:
        return files.read_bytes(url)
    except OSError as error:
        raise UserError(f"{setting} {url!r} cannot be read ({error}); name an image file") from error


def read_images(settings: InpaintConfig, data: ImageConfig) -> Tensor:
    """The images to complete, uint8 (B, H, W, channels).

    Raises:
        UserError: a file that is no image, or a position beyond the held-out images.
    """
    if settings.image:
        file = _read("inpaint.image", settings.image)
        try:
            return torch.from_numpy(decode(file, data).copy())[None]
        except BadImage as error:
            raise UserError(f"inpaint.image {settings.image!r} cannot be read as an image: {error}") from error
    images = first_images(data.validation, data, max(settings.samples) + 1)
    if len(images) <= max(settings.samples):
        raise UserError(
            f"inpaint.samples is {settings.samples}, but {data.validation!r} holds {len(images)} images: "
            f"positions are 0..{len(images) - 1}"
        )
    return stack([images[i] for i in settings.samples])


def read_mask(settings: InpaintConfig, size: int) -> Tensor:
    """What is known of every image, bool (size, size).

    Raises:
        UserError: the mask is no image or has another size, or the box does not lie within the image.
    """
    if settings.mask:
        return mask_of_picture(_read("inpaint.mask", settings.mask), size, f"inpaint.mask {settings.mask!r}")
    return mask_of_box(settings.box or [size // 4, size // 4, size - size // 4, size - size // 4], size, "inpaint.box")


def inpaint(experiment: Experiment, settings: InpaintConfig, fresh: bool = False) -> str:
    """Finished experiment -> <folder>/samples/inpainting-<settings>/inpainting.png.

    A row for each image: the image, what is known of it, its completions.

    Args:
        experiment: its folder, its held-out images and its sampling settings.
        settings: what is completed.
        fresh: draw again even if the same picture is there.

    Returns:
        The path of the picture.

    Raises:
        MissingError: a stage is not finished.
        UserError: an unknown class, an autoregressive prior, or an image, mask or box that is missing or does not fit.
    """
    images, mask = read_images(settings, experiment.data), read_mask(settings, experiment.data.image_size)
    found = open_pair(experiment)
    found.model.steps(experiment.sampling, completing=True)
    fingerprint = {
        **found.identity,
        "pixels": files.sha256(images.numpy().tobytes() + mask.numpy().tobytes()),
        **experiment.fingerprint("sampling"),
        **asdict(settings),
    }
    shown = files.sha256(repr((fingerprint["pixels"], settings, experiment.sampling)).encode())[:6]
    stage_name = f"samples/inpainting-seed{settings.seed}-{shown}"
    with open_stage(experiment, stage_name, fingerprint, "inpainting.png", fresh=fresh, on_change="redo") as stage:
        picture_url = stage.url("inpainting.png")
        if not stage.done:
            stage.run.tags(lineage(found.autoencoder, found.prior))
            pieces = [Piece(number, image, mask, settings) for number, image in enumerate(images)]
            drawn = map_on_actors(Inpainter, (experiment,), "complete", pieces, experiment.cluster, "inpaint")
            masked = torch.where(mask[..., None], images, _HIDDEN).to(torch.uint8)
            rows = [torch.cat([images[i : i + 1], masked[i : i + 1], made]) for i, made in enumerate(drawn)]
            picture = grid(torch.cat(rows), 2 + settings.completions)
            stage.run.picture(picture, "inpainting.png")
            stage.write("inpainting.png", png(picture))
        return picture_url
