"""The likelihood bound: an entropy where it can be known, and the sum of its steps on any grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bld_core.diffusion.bound import likelihood_bound, merge_bounds
from bld_core.diffusion.process import CodeBatch, DiffusionProcess, Target
from bld_core.diffusion.schedule import make_schedule
from bld_core.noise import uniform
from tests.bld_core.toys import (
    SCHEDULES,
    STATES,
    TARGETS,
    Oracle,
    exact_profile,
    iid_oracle,
    least_vlb,
    toy_codes,
    toy_distribution,
    toy_process,
)


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_likelihood_bound_measures_the_entropy(p: float) -> None:
    z_0 = (uniform(0, "held out", torch.arange(2000), 64) < p).to(torch.uint8).view(-1, 8, 8)
    bound = likelihood_bound(iid_oracle(p), toy_process("linear", 256), CodeBatch.numbered(z_0))
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert bound.standard_error < 0.02
    assert abs(bound.bits_per_bit - entropy) < 3 * bound.standard_error
    uninformed = likelihood_bound(
        lambda z, time, labels: torch.zeros_like(z), toy_process("linear", 256), CodeBatch.numbered(z_0)
    )
    assert abs(uninformed.bits_per_bit - 1) < 3 * uninformed.standard_error  # whatever the source, a guess pays 1 bit


def test_likelihood_bound_does_not_depend_on_the_batch_size() -> None:
    z_0 = (uniform(0, "held out", torch.arange(20), 32) < 0.7).to(torch.uint8).view(-1, 4, 8)
    process = toy_process("cosine", 64)
    bounds = {
        likelihood_bound(iid_oracle(0.7), process, CodeBatch.numbered(z_0), batch_size=size) for size in (1, 7, 1000)
    }
    assert len(bounds) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_bounds_of_parts_merge_to_that_of_all_codes(target: Target) -> None:
    process, p = toy_process("linear", 16, target), toy_distribution(2)
    oracle, z_0 = Oracle(p, process), toy_codes(p, 300)
    for grid in (process.schedule.grid(16), process.schedule.grid(5)):
        whole = likelihood_bound(oracle, process, CodeBatch.numbered(z_0), grid, seed=3)
        parts = [
            likelihood_bound(oracle, process, CodeBatch.numbered(z_0[start:stop], first=start), grid, seed=3)
            for start, stop in ((0, 2), (2, 131), (131, 300))
        ]
        found = merge_bounds(parts)
        assert found.codes == whole.codes == 300
        assert found.bits_per_bit == pytest.approx(whole.bits_per_bit, rel=1e-6)  # float32 in other batches
        assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-6)
        assert found.profile == pytest.approx(whole.profile, rel=1e-6)


# --- The profile, and strided grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_profile_sums_to_the_bound_and_is_the_vlb_of_every_t(name: str, target: Target) -> None:
    process, p = toy_process(name, 16, target), toy_distribution(0)
    bound = likelihood_bound(Oracle(p, process), process, CodeBatch.numbered(toy_codes(p, 20_000)))
    assert len(bound.profile) == 16
    assert sum(bound.profile) == pytest.approx(bound.bits_per_bit, rel=1e-12)
    truth = exact_profile(p, process.schedule, process.schedule.grid(16))
    assert abs(bound.bits_per_bit - float(truth.sum())) < 4 * bound.standard_error
    assert bound.standard_error < 0.01
    torch.testing.assert_close(torch.tensor(bound.profile, dtype=torch.float64), truth, rtol=0.1, atol=2e-4)
    least = [least_vlb(p, k_s, k_t) / math.log(2) for k_s, k_t in itertools.pairwise(process.schedule.k.tolist())]
    torch.testing.assert_close(truth, torch.tensor(least, dtype=torch.float64), rtol=1e-7, atol=1e-12)


def test_the_profile_of_many_steps_sums_to_the_bound_even_where_few_are_met() -> None:
    z_0 = (uniform(0, "held out", torch.arange(20), 32) < 0.7).to(torch.uint8).view(-1, 4, 8)
    bound = likelihood_bound(iid_oracle(0.7), toy_process("cosine", 1024), CodeBatch.numbered(z_0))
    assert len(bound.profile) == 1024
    assert sum(entry > 0 for entry in bound.profile) <= 160
    assert sum(bound.profile) == pytest.approx(bound.bits_per_bit, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_of_a_grid_falls_towards_the_entropy_as_it_takes_more_steps(name: str) -> None:
    schedule = make_schedule(name, 256)
    for seed in range(2):
        p = toy_distribution(seed)
        entropy = -float((p * p.log2()).sum()) / 3
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        bounds = [float(exact_profile(p, schedule, schedule.grid(count)).sum()) for count in counts]
        marginals = torch.stack([(p[:, None] * STATES).sum(0), (p[:, None] * (1 - STATES)).sum(0)])
        assert bounds[0] == pytest.approx(-float(torch.xlogy(marginals, marginals).sum()) / math.log(2) / 3)
        for more, fewer in itertools.pairwise(reversed(bounds)):
            assert entropy < more < fewer
        assert bounds[-1] - entropy < 0.01


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_bound_measures_the_steps_of_its_grid(name: str, target: Target, count: int) -> None:
    process, p = toy_process(name, 64, target), toy_distribution(1)
    grid, oracle, z_0 = process.schedule.grid(count), Oracle(p, process), toy_codes(p, 5000)
    bound = likelihood_bound(oracle, process, CodeBatch.numbered(z_0), grid)
    truth = exact_profile(p, process.schedule, grid)
    assert len(bound.profile) == count
    assert abs(bound.bits_per_bit - float(truth.sum())) < 4 * bound.standard_error
    assert sum(bound.profile) == pytest.approx(bound.bits_per_bit, rel=1e-12)
    if count == 64:
        assert bound == likelihood_bound(oracle, process, CodeBatch.numbered(z_0))


def test_a_grid_that_is_none_is_refused() -> None:
    schedule, codes = make_schedule("linear", 16), CodeBatch.numbered(torch.zeros(4, 1, 3))
    oracle = Oracle(toy_distribution(0), DiffusionProcess(schedule))
    for grid in ([16], [16, 8], [8, 0], [16, 8, 8, 0], [0, 16]):
        with pytest.raises(ValueError, match=r"grid is \[.*T = 16 to 0"):
            likelihood_bound(oracle, DiffusionProcess(schedule), codes, grid)


def test_likelihood_bound_needs_two_codes() -> None:
    with pytest.raises(ValueError, match=r"1 held-out.*at least 2"):
        likelihood_bound(iid_oracle(0.5), toy_process("linear", 4), CodeBatch.numbered(torch.zeros(1, 4, 8)))
