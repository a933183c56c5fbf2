"""Images as tensors: uint8 (B, H, W, channels) as they are stored and shown, float (B, channels, H, W) for networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bld_core.data.images import LabelledImage


def stack(images: Sequence[LabelledImage]) -> Tensor:
    """The pixels of images as one tensor, uint8 (B, H, W, channels)."""
    return torch.from_numpy(np.stack([image.pixels for image in images]))


def to_float(images_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, channels) -> float32 (B, channels, H, W) in [-1, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Float (B, channels, H, W) in [-1, 1] -> uint8 (B, H, W, channels): clamped, then rounded."""
    return x_BCHW.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
