"""What numbers networks compute in: one policy, in one place.

float32 is IEEE float32 in every product and convolution. A GPU would otherwise take TF32, of 11 significant bits, for
convolutions and not for products. So it is around all that is measured, encoded or drawn. Training says what it takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
TrainingPrecision = Literal["float32", "tf32", "bfloat16"]

_lock = threading.Lock()
_blocks = 0
_before = (False, False)


def autocast(precision: TrainingPrecision, device: torch.device) -> torch.autocast:
    """The context of forward passes: products and convolutions in bfloat16 where the precision says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextlib.contextmanager
def ieee_float32() -> Generator[None]:
    """Float32 is IEEE float32 in this process, until the last of the blocks in it that say so has ended.

    Threads may be in such blocks at the same time.
    """
    global _blocks, _before
    with _lock:
        if _blocks == 0:
            _before = _tf32()
            _set_tf32(False, False)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _set_tf32(*_before)


@contextlib.contextmanager
def training_arithmetic(precision: TrainingPrecision) -> Generator[None]:
    """Around forward and backward passes of training, of which a process has one: IEEE float32, or else TF32.

    With bfloat16 that is for what autocast leaves in float32, such as the perceptual network.
    """
    before, allowed = _tf32(), precision != "float32"
    _set_tf32(allowed, allowed)
    try:
        yield
    finally:
        _set_tf32(*before)


def _tf32() -> tuple[bool, bool]:
    """Whether a GPU takes TF32 for products, and for convolutions."""
    return bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32


def _set_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
