"""Averages of weights: what a relative length means, and averages of any length from snapshots of two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bld_core.training.averages import SNAPSHOT_LENGTHS, PowerEma, combination, combined, power_of_length
from bld_core.training.loop import TrainingConfig, make_state
from tests.bld_core.toys import tiny_prior

STEPS, EVERY = 1600, 100


@pytest.mark.parametrize(("length", "power"), [(0.05, 16.97), (0.1, 6.94)])  # Karras et al. 2024, Section 3.1
def test_the_power_of_a_length_is_the_papers(length: float, power: float) -> None:
    assert power_of_length(length) == pytest.approx(power, abs=0.005)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_a_relative_length_is_the_deviation_of_the_steps_that_count(length: float) -> None:
    step = nn.Linear(1, 1, bias=False).double()
    first, second = PowerEma(step, length), PowerEma(step, length)  # of tau and tau^2
    for tau in range(1, STEPS + 1):
        for average, value in ((first, tau), (second, tau**2)):
            with torch.no_grad():
                step.weight.fill_(value)
            average.update(step, tau)
    mean, square = (float(average.weights["weight"].item()) for average in (first, second))
    assert (square - mean**2) ** 0.5 / STEPS == pytest.approx(length, rel=0.02)


def test_the_first_step_forgets_the_initialisation() -> None:
    module = nn.Linear(3, 3)
    average = PowerEma(module, 0.1)
    with torch.no_grad():
        module.weight.normal_()
    average.update(module, 1)
    assert torch.equal(average.weights["weight"], module.weight)


def walk(lengths: list[float]) -> tuple[Tensor, dict[float, Tensor], list[tuple[tuple[int, float], dict[str, Tensor]]]]:
    """Weights that wander as in training: the last of them, averages that saw all steps, and snapshots."""
    generator, module = torch.Generator().manual_seed(0), nn.Linear(20, 20, bias=False)
    goal = torch.randn(20, 20, generator=generator)
    direct = {length: PowerEma(module, length) for length in lengths}
    sources = {length: PowerEma(module, length) for length in SNAPSHOT_LENGTHS}
    kept: list[tuple[tuple[int, float], dict[str, Tensor]]] = []
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            noise = torch.randn(20, 20, generator=generator)
            module.weight.add_(0.02 * noise + 0.01 * (goal - module.weight))
        for average in (*direct.values(), *sources.values()):
            average.update(module, step)
        if step % EVERY == 0:
            weights = {length: average.weights["weight"].clone() for length, average in sources.items()}
            kept += [((step, length), {"weight": weight}) for length, weight in weights.items()]
    return module.weight.detach(), {length: each.weights["weight"] for length, each in direct.items()}, kept


def test_an_average_of_any_length_is_a_sum_of_snapshots() -> None:
    lengths = [0.03, 0.05, 0.07, 0.1, 0.15, 0.2]
    last, direct, kept = walk(lengths)
    for length in lengths:
        coefficients = combination([which for which, _ in kept], length)
        assert sum(coefficients) == pytest.approx(1, abs=0.01)
        found = combined(coefficients, (weights for _, weights in kept))["weight"]
        error = (found - direct[length]).norm() / (last - direct[length]).norm()
        assert float(error) < (1e-5 if length in SNAPSHOT_LENGTHS else 0.05), length
    # And of no other length: the next one is farther away than that.
    near = combined(combination([which for which, _ in kept], 0.15), (weights for _, weights in kept))["weight"]
    assert float((near - direct[0.2]).norm() / (last - direct[0.2]).norm()) > 0.1


def test_what_is_no_real_number_is_the_last_snapshots() -> None:
    snapshots = [{"count": torch.tensor(n), "weight": torch.tensor([float(n)])} for n in (1, 5)]
    found = combined([0.25, 0.75], snapshots)
    assert found["count"] == 5
    assert found["weight"].tolist() == [4.0]


def test_lengths_add_two_averages_to_a_state() -> None:
    state = make_state(tiny_prior(), TrainingConfig(ema_decay=[0.9, 0.99], ema_lengths=[0.2]))
    assert [getattr(each, "length", each.decay) for each in state.averages] == [0.9, 0.99, *SNAPSHOT_LENGTHS]
    assert TrainingConfig(steps=100).snapshot_every == 7
    for wrong in (0.0, 0.29, -0.1):
        with pytest.raises(ValueError, match=r"`ema_lengths` is .*; each must lie in \(0, 0.2887\)"):
            TrainingConfig(ema_lengths=[wrong])
