"""Randomness as a function, not a state: uniform numbers keyed on (seed, purpose, index).

Every random choice of this project that must not depend on how the work is split (time steps, bit
flips, label dropout, code draws, sampling noise) is a pure function of who it is for: sample 17 gets the same
numbers in any batch, on any worker, on any device, before or after a restart. Counter-based: the
splitmix64 finaliser (Steele, Lea, Flood 2014) over a 64-bit key per sample and an element counter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The two's-complement int64 with the same 64 bits: torch has no full uint64 arithmetic."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical right shift; torch's is arithmetic on int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def key_of(*parts: object) -> int:
    """A signed 64-bit key from any printable parts: the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def uniform(seed: int | Sequence[int], purpose: str, index: Tensor, size: int) -> Tensor:
    """Uniform numbers in [0, 1) with 24 random bits, a row for each index.

    Args:
        seed: the experiment's seed, or one for each row.
        purpose: what the numbers are for; another purpose gives independent numbers.
        index: int64, (B,): global sample indices or keys; the rows live on its device.
        size: numbers a row.

    Returns:
        float32, (B, size). Row i depends on (seed, purpose, index[i]) alone, with its own seed where each has one.
    """
    key = (
        key_of(seed, purpose)
        if isinstance(seed, int)
        else torch.tensor([[key_of(each, purpose)] for each in seed], device=index.device)[:, 0]
    )
    row_key = _mix(_mix(index + _signed(_GOLDEN)) ^ key)
    counter = torch.arange(1, size + 1, dtype=torch.int64, device=index.device) * _signed(_GOLDEN)
    bits = _mix(row_key[:, None] + counter[None, :])
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def permutation(seed: int, purpose: str, epoch: int, size: int) -> Tensor:
    """An order of `size` things, int64: a function of (seed, purpose, epoch)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(key_of(seed, purpose, epoch)))
