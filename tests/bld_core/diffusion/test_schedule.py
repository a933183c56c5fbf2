from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from bld_core.diffusion.schedule import NoiseSchedule, make_schedule, schedule_from_betas
from tests.bld_core.toys import SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 64, 1024])
def test_k_falls_strictly_from_exactly_1_to_exactly_0(name: str, steps: int) -> None:
    k = make_schedule(name, steps).k
    assert len(k) == steps + 1
    assert k[0] == 1
    assert k[-1] == 0
    assert (k.diff() < 0).all()


def test_linear_is_the_schedule_of_betas_one_over_what_is_left() -> None:
    steps = 64
    betas = [1 / (steps - t + 1) for t in range(1, steps + 1)]
    torch.testing.assert_close(schedule_from_betas(betas).k, make_schedule("linear", steps).k, rtol=0, atol=1e-12)


def test_betas_multiply_to_k() -> None:
    k = schedule_from_betas([0.5, 0.9, 0.99]).k
    torch.testing.assert_close(k, torch.tensor([1, 0.5, 0.05, 0.0005], dtype=torch.float64), rtol=1e-12, atol=0)


def test_betas_that_leave_signal_are_refused_with_value_and_bound() -> None:
    with pytest.raises(ValueError, match=r"0\.9044.*0\.001"):
        schedule_from_betas([0.01] * 10)
    schedule_from_betas([0.9991])  # just inside
    with pytest.raises(ValueError, match="within"):
        schedule_from_betas([0.9989])


@pytest.mark.parametrize("betas", [[0.5, 0.0, 1.0], [0.5, -0.1, 1.0], [1.5]])
def test_betas_outside_0_to_1_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"beta|ends at"):
        schedule_from_betas(betas)


def test_k_must_be_a_float64_vector() -> None:
    with pytest.raises(ValueError, match=r"float32.*float64"):
        NoiseSchedule(torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["k", "t"])
@pytest.mark.parametrize("steps", [4, 64, 1024])
def test_every_grid_falls_strictly_from_t_max_to_0_with_count_steps(
    name: str, spacing: Literal["k", "t"], steps: int
) -> None:
    schedule = make_schedule(name, steps)
    for count in {*range(1, min(steps, 70) + 1), steps // 2, steps - 1, steps}:
        grid = schedule.grid(count, spacing)
        assert len(grid) == count + 1
        assert grid[0] == steps
        assert grid[-1] == 0
        assert all(t > s for t, s in itertools.pairwise(grid))
    assert schedule.grid(steps, spacing) == list(range(steps, -1, -1))


def test_spacing_k_takes_equal_steps_of_signal_and_spacing_t_of_time() -> None:
    schedule = make_schedule("cosine", 1024)
    signal = schedule.k[torch.tensor(schedule.grid(16, "k"))]
    torch.testing.assert_close(signal, torch.linspace(0, 1, 17, dtype=torch.float64), rtol=0, atol=1e-3)
    assert schedule.grid(16, "t") == list(range(1024, -1, -64))


@pytest.mark.parametrize("count", [0, 65, -1])
def test_a_bad_count_is_named_with_its_bound(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^{count} sampling steps.*T = 64"):
        make_schedule("linear", 64).grid(count)


def test_a_bad_name_or_length_is_named_with_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"'quadratic'.*linear, cosine, sigmoid"):
        make_schedule("quadratic", 64)
    with pytest.raises(ValueError, match=r"steps is 0.*at least 1"):
        make_schedule("linear", 0)
