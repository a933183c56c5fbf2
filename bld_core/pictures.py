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
    """Rows of images, each above the row of its reconstructions; uint8 (B, H, W, channels) each."""
    columns = min(columns, len(images))
    pairs = [
        torch.cat([images[i : i + columns], reconstructions[i : i + columns]])
        for i in range(0, len(images) // columns * columns, columns)
    ]
    return grid(torch.cat(pairs), columns)


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
