"""Grids of images as one picture."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_GAP = 2
_MIN_SIDE = 64


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images, row after row, with a thin gap; small images are enlarged by a whole factor to be visible.

    Args:
        images: uint8 (B, H, W, channels), 1 or 3 channels.
        columns: images a row.
    """
    scale = max(1, _MIN_SIDE // images.shape[1])
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255).byte()
    for i in range(count):
        top, left = _GAP + i // columns * (height + _GAP), _GAP + i % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = images[i]
    return Image.fromarray(canvas.squeeze(-1).numpy() if channels == 1 else canvas.numpy())


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
