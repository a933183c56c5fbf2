"""splitmix64 (Steele, Lea, Flood 2014): random bits as a function of a key, an index and a counter.

One arithmetic for arrays of numpy and of torch. Importing it does not import torch: a machine has dozens of processes
that decode images, which are ready in half the time without it, and take a third of the memory.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", "Tensor", "NDArray[np.int64]")

_MASK_64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """The two's-complement int64 with the same 64 bits: torch has no full uint64 arithmetic."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Array, n: int) -> Array:
    """Logical right shift; that of int64 is arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Array) -> Array:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def key_of(*parts: object) -> int:
    """A signed 64-bit key from any printable parts: the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def random_bits(key: Array | int, index: Array, counter: Array) -> Array:
    """24 random bits for each index and each number of a counter.

    Args:
        key: one, or one for each index.
        index: int64, (B,).
        counter: int64, (N,), from 1.

    Returns:
        int64, (B, N), in [0, 2^24).
    """
    row_key = _mix(_mix(index + _GOLDEN) ^ key)
    return _shift_right(_mix(row_key[:, None] + (counter * _GOLDEN)[None, :]), 40)


def numbers(seed: int, purpose: str, index: int, size: int) -> list[float]:
    """The row of `bld_core.noise.uniform` for one index."""
    counter = np.arange(1, size + 1, dtype=np.int64)
    bits = random_bits(key_of(seed, purpose), np.array([index], np.int64), counter)
    return (bits[0] * 2.0**-24).tolist()
