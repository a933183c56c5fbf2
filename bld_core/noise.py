"""Randomness as a function, not a state: uniform numbers keyed on (seed, purpose, index).

Every random choice of this project that must not depend on how the work is split (time steps, bit
flips, label dropout, code draws, sampling noise) is a pure function of who it is for: sample 17 gets the same
numbers in any batch, on any worker, on any device, before or after a restart. Counter-based: splitmix64 over a 64-bit
key per sample and an element counter (bld_core/splitmix.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bld_core.splitmix import key_of, random_bits


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
    counter = torch.arange(1, size + 1, dtype=torch.int64, device=index.device)
    return random_bits(key, index, counter).to(torch.float32) * 2.0**-24


def permutation(seed: int, purpose: str, epoch: int, size: int) -> Tensor:
    """An order of `size` things, int64: a function of (seed, purpose, epoch)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(key_of(seed, purpose, epoch)))
