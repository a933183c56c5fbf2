"""Codes of 0/1 <-> packed bytes, most significant bit first, as numpy.packbits; on CPU and on the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _weights(device: torch.device) -> Tensor:
    """128, 64, ..., 1, made on the device: to copy them there would wait for it."""
    return 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack codes into bytes.

    Args:
        bits: (N, ...) of 0/1 (any dtype), D = product of the rest.

    Returns:
        uint8 (N, D/8), in the order of numpy.packbits over the flattened rest.

    Raises:
        ValueError: D is not a multiple of 8.
    """
    size = math.prod(bits.shape[1:])
    if size % 8:
        raise ValueError(f"{size} bits a sample are not whole bytes; make the number of bits a multiple of 8")
    weights = _weights(bits.device)
    octets = bits.reshape(len(bits), size // 8, 8).to(torch.uint8)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack_bits`: uint8 (N, D/8) -> uint8 0/1 (N, *shape).

    Raises:
        ValueError: `shape` does not hold exactly the bits of a packed row.
    """
    if math.prod(shape) != packed.shape[1] * 8:
        raise ValueError(
            f"a packed row of {packed.shape[1]} bytes holds {packed.shape[1] * 8} bits; shape {tuple(shape)} "
            f"asks for {math.prod(shape)}"
        )
    return ((packed[..., None] & _weights(packed.device)) != 0).to(torch.uint8).view(len(packed), *shape)
