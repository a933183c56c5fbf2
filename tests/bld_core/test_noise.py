"""Randomness as a function: golden values, independence from the batch, and the look of uniform noise."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from bld_core.noise import permutation, uniform
from bld_core.splitmix import key_of, numbers

MASK = (1 << 64) - 1
GOLDEN = [[97530, 3729431, 15274214], [701902, 6334506, 982235]]  # in units of 2^-24; indices 0 and 1
GOLDEN_KEY = -4944689159812287110


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def number(seed: int, purpose: str, index: int, position: int) -> float:
    """The same definition in Python's integers."""
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}".encode(), digest_size=8).digest()
    row = splitmix(splitmix((index + 0x9E3779B97F4A7C15) & MASK) ^ int.from_bytes(digest, "big"))
    return (splitmix((row + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24


def test_splitmix_is_the_published_one() -> None:
    # The first outputs of SplitMix64 from seed 1234567, as its authors and Rosetta Code list them.
    outputs = [splitmix((1234567 + i * 0x9E3779B97F4A7C15) & MASK) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("index", [0, 1, 17, 2**40, -(2**63), key_of("0000", "draw")])
def test_uniform_equals_its_definition_in_exact_integers(index: int) -> None:
    row = uniform(3, "flips", torch.tensor([index]), 9)[0]
    assert row.tolist() == [number(3, "flips", index, position) for position in range(9)]


@pytest.mark.parametrize("index", [0, 17, -(2**63), key_of("0000", "draw")])
def test_numbers_without_torch_are_a_row_of_those_with_it(index: int) -> None:
    assert numbers(3, "flips", index, 9) == uniform(3, "flips", torch.tensor([index]), 9)[0].tolist()


def test_golden_values() -> None:
    row = uniform(0, "golden", torch.tensor([0, 1]), 3)
    assert (row * 2**24).long().tolist() == GOLDEN
    assert key_of(0, "golden") == GOLDEN_KEY


def test_a_row_is_a_function_of_seed_purpose_and_index_alone() -> None:
    index = torch.tensor([5, 900, -3, 2**50, 5])
    whole = uniform(1, "a", index, 33)
    for i in range(5):
        assert torch.equal(uniform(1, "a", index[i : i + 1], 33)[0], whole[i])
    assert torch.equal(whole[0], whole[4])
    assert torch.equal(uniform(1, "a", index, 7), whole[:, :7])  # nor does the size matter
    for other in (uniform(2, "a", index, 33), uniform(1, "b", index, 33), uniform(1, "a", index + 1, 33)):
        assert not (other == whole).all(1).any()


def test_numbers_lie_in_0_to_1_and_the_ends_are_reached() -> None:
    u = uniform(0, "range", torch.arange(2000), 2000)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.min()) < 2**-20
    assert float(u.max()) > 1 - 2**-20


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_numbers_are_uniform(axis: str) -> None:
    n = 1_000_000  # many indices of one number each, and one index of many numbers
    u = uniform(0, "uniform", torch.arange(n), 1) if axis == "rows" else uniform(0, "uniform", torch.arange(1), n)
    u = u.flatten().double()
    assert abs(float(u.mean()) - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, 256, 0, 1)
    chi_square = float(((counts - n / 256) ** 2).sum() / (n / 256))
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


def test_neighbours_and_purposes_are_not_correlated() -> None:
    n = 500_000
    index = torch.arange(n)
    first = uniform(0, "a", index, 2).double() - 0.5
    others = {
        "next index": uniform(0, "a", index + 1, 1),
        "next power of two": uniform(0, "a", index + 2**32, 1),
        "next seed": uniform(1, "a", index, 1),
        "purpose": uniform(0, "b", index, 1),
        "next number": uniform(0, "a", index, 2)[:, 1:],
    }
    for name, other in others.items():
        correlation = float((first[:, 0] * (other[:, 0].double() - 0.5)).mean() * 12)
        assert abs(correlation) < 4 / math.sqrt(n), name


def test_keys_tell_their_parts_apart() -> None:
    keys = {key_of(*parts) for parts in [(1, "a"), ("1a",), (1, "a", ""), ("a", 1), (2, "a"), (1, "b"), (11,), (1, 1)]}
    assert len(keys) == 8
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_permutation_is_one_and_a_function_of_its_arguments() -> None:
    order = permutation(0, "order", 3, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(permutation(0, "order", 3, 1000), order)
    for other in (permutation(1, "order", 3, 1000), permutation(0, "else", 3, 1000), permutation(0, "order", 4, 1000)):
        assert not torch.equal(other, order)


def test_a_permutation_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    permutation(0, "order", 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_with_seeds_of_their_own_are_those_of_their_seeds() -> None:
    index, seeds = torch.tensor([0, 3, 3]), [5, 5, 9]
    rows = [uniform(seed, "p", index[n : n + 1], 7) for n, seed in enumerate(seeds)]
    assert torch.equal(uniform(seeds, "p", index, 7), torch.cat(rows))
