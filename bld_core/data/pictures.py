"""Images as pictures: grids, files, masks."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bld_core.errors import UserError

_GAP = 2
_MIN_SIDE = 64
_HEADING = 14  # pixels
_MOST_PIXELS = 1 << 23


def grid(images: Tensor, columns: int, names: Sequence[str] = ()) -> Image.Image:
    """Images, row after row, with a thin gap; small images are enlarged by a whole factor to be visible.

    Args:
        images: uint8 (B, H, W, channels), 1 or 3 channels.
        columns: images a row.
        names: a heading for each column, cut to its width; none makes no room for them.
    """
    scale = max(1, _MIN_SIDE // images.shape[1])
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255).byte()
    for i in range(count):
        top, left = _GAP + i // columns * (height + _GAP), _GAP + i % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = images[i]
    return _headed(picture(canvas), names, width) if names else picture(canvas)


def _headed(shown: Image.Image, names: Sequence[str], width: int) -> Image.Image:
    """A grid of columns of this width beneath a heading for each."""
    found = Image.new(shown.mode, (shown.width, shown.height + _HEADING), "white")
    found.paste(shown, (0, _HEADING))
    for number, name in enumerate(names):
        heading = Image.new(shown.mode, (width, _HEADING), "white")
        ImageDraw.Draw(heading).text((0, 0), name, fill="black", font=ImageFont.load_default(_HEADING - 4))
        found.paste(heading, (_GAP + number * (width + _GAP), 0))
    return found


def fitting(image_size: int, most: int, times: int = 1) -> int:
    """How many images of a size make one picture, each shown so many times: at most `most`, but 2 however large."""
    return max(2, min(most, _MOST_PIXELS // (times * image_size**2)))


def picture(image_HWC: Tensor) -> Image.Image:
    """One image, uint8 (H, W, 1 or 3), as a picture: grey or RGB."""
    return Image.fromarray((image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC).numpy())


def reconstruction_grid(images: Tensor, reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """Rows of images, each above the row of its reconstructions and the row of their differences.

    A difference is grey, 128 + (reconstruction - image) / 2, rounded down: flat grey where nothing differs.

    Args:
        images: uint8 (B, H, W, channels); a last row that is not full is left out.
        reconstructions: the same shape.
        columns: images a row, at most B.
    """
    columns = min(columns, len(images))
    differences = (128 + (reconstructions.int() - images.int()).div(2, rounding_mode="floor")).to(torch.uint8)
    rows = [
        part[i : i + columns]
        for i in range(0, len(images) // columns * columns, columns)
        for part in (images, reconstructions, differences)
    ]
    return grid(torch.cat(rows), columns)


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def read_picture(data: bytes, size: int, channels: int, name: str, formats: tuple[str, ...] | None = None) -> Tensor:
    """A picture's file as an image of exactly this size, uint8 (size, size, channels).

    Args:
        data: the file.
        size: in pixels, of both sides.
        channels: 1 is grey, 3 is RGB; other pictures are converted.
        name: of the picture in messages.
        formats: that it may have, by Pillow's names; None is all that Pillow reads.

    Raises:
        UserError: it is no picture, or has another size, which is known before it is decoded.
    """
    try:
        shown = Image.open(io.BytesIO(data), formats=formats)
        if shown.size == (size, size):
            pixels = np.array(shown.convert("L" if channels == 1 else "RGB"))
            return torch.from_numpy(pixels).view(size, size, channels)
    except MemoryError:
        raise
    except Exception as error:  # there is nothing that some decoder of Pillow's does not raise of some file
        raise UserError(f"{name} cannot be read as an image: {error}") from error
    raise UserError(
        f"{name} is {shown.width} x {shown.height} pixels; it must be {size} x {size}, as the images are that the "
        "networks take"
    )


def mask_of_picture(data: bytes, size: int, name: str) -> Tensor:
    """What a picture of a mask says is known, where it is white: bool (size, size); see `read_picture`."""
    return read_picture(data, size, 1, name)[..., 0] >= 128


def mask_of_box(box: Sequence[int], size: int, name: str) -> Tensor:
    """What is known outside of a box, left, top, right, bottom in pixels: bool (size, size).

    Raises:
        UserError: the box does not lie within the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(
            f"{name} is {list(box)}; left < right and top < bottom must lie in 0..{size}, the image's pixels"
        )
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask
