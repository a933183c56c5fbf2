from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.mind import DIRECTIONS, directions, mind

SIZE = 24


def features(count: int, seed: int) -> Tensor:
    return (torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed)) + 0.1 * seed).relu()


def test_it_is_its_definition_in_numpy_with_every_transport_solved() -> None:
    a, b, u = features(20, 1).double().numpy(), features(20, 2).double().numpy(), directions(DIRECTIONS, SIZE).numpy()
    total = 0.0
    for direction in u:
        cost = np.square((a @ direction)[:, None] - (b @ direction)[None])
        total += cost[linear_sum_assignment(cost)].mean()  # over all ways to pair them
    assert mind(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(3 * SIZE * total / len(u), rel=1e-9)


def test_directions_are_uniform_on_the_sphere_and_always_the_same() -> None:
    u = directions(DIRECTIONS, SIZE)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(DIRECTIONS, dtype=torch.float64))
    assert torch.equal(u[:10], directions(10, SIZE))
    error = (2 / DIRECTIONS) ** 0.5 / SIZE  # of a second moment, at most
    assert (u.T @ u / DIRECTIONS - torch.eye(SIZE) / SIZE).abs().max() < 5 * error
    assert u.mean(0).abs().max() < 5 / (SIZE * DIRECTIONS) ** 0.5


def test_a_shift_is_seen_as_three_times_its_square_and_order_does_not_count() -> None:
    a, v = features(50, 1).double(), torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    assert mind(a, a.flip(0)) == pytest.approx(0, abs=1e-20)
    assert mind(a, a + v) == pytest.approx(3 * float(v @ v), rel=0.2)  # 3 F E (u v)^2, which is 3 |v|^2
    b = features(50, 2)
    assert mind(a, b) == pytest.approx(mind(b.flip(0), a), rel=1e-12)
    assert mind(a, torch.cat([b, b + 9])) == pytest.approx(mind(a, b), rel=1e-12), "of the larger set the first count"
    for other in (b[:0], b[:, 1:], b[0]):
        with pytest.raises(ValueError, match=r"must be \(n, F\)"):
            mind(a, other)


def test_it_sees_what_moments_do_not() -> None:
    n = 20_000
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal = torch.special.ndtri(quantiles)[:, None]
    signs = normal.sign() * normal.std()
    moments = [FeatureMoments(), FeatureMoments()]
    for found, values in zip(moments, (normal, signs), strict=True):
        found.update(values)
    assert frechet_distance(*moments) < 1e-3
    assert mind(normal, signs) == pytest.approx(3 * (2 - 2 * math.sqrt(2 / math.pi)), rel=1e-3)
