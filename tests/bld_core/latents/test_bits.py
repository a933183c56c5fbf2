from __future__ import annotations

import numpy as np
import pytest
import torch

from bld_core.latents.bits import pack_bits, unpack_bits

SHAPES = [(8,), (2, 4), (4, 4, 8), (16, 16, 32), (3, 5, 8), (1, 1, 64)]


def random_bits(rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 2, (rows, *shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool])
def test_packing_is_numpys_and_unpacking_its_inverse(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for rows in (0, 1, 5):
        bits = random_bits(rows, shape).to(dtype)
        packed = pack_bits(bits)
        assert packed.dtype == torch.uint8
        truth = np.packbits(bits.to(torch.uint8).numpy().reshape(rows, int(np.prod(shape))), axis=1)
        np.testing.assert_array_equal(packed.numpy(), truth)
        back = unpack_bits(packed, shape)
        assert back.dtype == torch.uint8
        assert torch.equal(back, bits.to(torch.uint8))


def test_every_byte_survives_the_way_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_bits(unpack_bits(every, (8,))), every)
    assert unpack_bits(torch.tensor([[0b10000001]], dtype=torch.uint8), (8,)).tolist() == [[1, 0, 0, 0, 0, 0, 0, 1]]


def test_strided_bits_pack_in_their_logical_order() -> None:
    bits = random_bits(3, (8, 4, 4)).permute(0, 2, 3, 1)
    assert torch.equal(pack_bits(bits), pack_bits(bits.contiguous()))


def test_broken_bytes_and_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="12 bits a sample are not whole bytes"):
        pack_bits(random_bits(2, (3, 4)))
    with pytest.raises(ValueError, match=r"2 bytes holds 16 bits; shape \(3, 8\) asks for 24"):
        unpack_bits(torch.zeros(1, 2, dtype=torch.uint8), (3, 8))
