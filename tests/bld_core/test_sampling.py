"""The reverse process, against exact distributions over the 8 states of 3-bit toys."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from bld_core.diffusion import Target, calibrate, reverse_flip_probability
from bld_core.noise import uniform
from bld_core.sampling import SamplingConfig, guided_evidence, sample_codes
from bld_core.schedule import make_schedule
from tests.bld_core.toys import (
    SCHEDULES,
    STATES,
    TARGETS,
    Oracle,
    chain_distribution,
    oracle_evidence,
    state_number,
    total_variation,
    toy_distribution,
)

SEEDS = range(6)


def elementwise(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    """A denoiser that judges every bit alone, so that a batch cannot change its arithmetic."""
    shift = 0.0 if labels is None else labels[:, None, None] * 0.5
    return (1 - 2 * z) * (0.7 + time[:, None, None]) + shift


# --- The distribution that the chain ends in --------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "bound"), [("linear", 0.003), ("cosine", 0.003), ("sigmoid", 0.005)])
def test_256_exact_steps_reach_the_true_distribution(name: str, bound: float, target: Target) -> None:
    schedule = make_schedule(name, 256)
    for seed in SEEDS:
        p = toy_distribution(seed)
        assert total_variation(chain_distribution(p, schedule, schedule.grid(256), target), p) <= bound


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_targets_oracles_make_the_same_chain(name: str) -> None:
    schedule, p = make_schedule(name, 64), toy_distribution(3)
    for grid in (schedule.grid(64), schedule.grid(7)):
        flip, z0 = (chain_distribution(p, schedule, grid, target) for target in ("flip", "z0"))
        torch.testing.assert_close(z0, flip, rtol=0, atol=1e-12)
    z_prev = chain_distribution(p, schedule, schedule.grid(64), "z_prev")
    torch.testing.assert_close(z_prev, chain_distribution(p, schedule, schedule.grid(64)), rtol=0, atol=1e-9)


def test_the_error_halves_each_time_the_steps_double() -> None:
    for seed in SEEDS:
        p = toy_distribution(seed)
        chains = (make_schedule("linear", steps) for steps in (16, 32, 64, 128))
        errors = [total_variation(chain_distribution(p, chain, chain.grid(chain.steps)), p) for chain in chains]
        for coarse, fine in itertools.pairwise(errors):
            assert fine / coarse == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["k", "t"])
def test_the_strided_grid_of_all_steps_is_the_plain_chain(name: str, spacing: Literal["k", "t"]) -> None:
    schedule = make_schedule(name, 64)
    k, p = schedule.k.tolist(), toy_distribution(0)
    now = torch.full((8,), 1 / 8, dtype=torch.float64)
    for t in range(64, 0, -1):  # Eq. 4 and Bayes' rule for each bit, one step at a time
        beta = 1 - k[t] / k[t - 1]
        r = torch.sigmoid(calibrate(oracle_evidence(p, k[t]), k[t]))
        early, late = (1 - k[t - 1]) / 2, beta / 2  # flipped before t - 1, flipped in this step
        flipped = late * (1 - early) / (late * (1 - early) + (1 - late) * early)
        clean = late * early / (late * early + (1 - late) * (1 - early))
        change = (r * flipped + (1 - r) * clean)[:, None]
        now = now @ torch.where(STATES[:, None] != STATES[None], change, 1 - change).prod(-1)
    torch.testing.assert_close(chain_distribution(p, schedule, schedule.grid(64, spacing)), now, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "steps"), [("linear", 64), ("cosine", 5)])
def test_sample_codes_draws_from_the_exact_chain(name: str, steps: int) -> None:
    count, schedule = 40_000, make_schedule(name, 64)
    for seed in (0, 1):
        p = toy_distribution(seed)
        config = SamplingConfig(steps=steps, temperature=1.0)
        z = sample_codes(Oracle(p, schedule), (1, 3), None, torch.arange(count), schedule, config, seed)
        drawn = torch.bincount(state_number(z).flatten(), minlength=8).double() / count
        truth = chain_distribution(p, schedule, schedule.grid(steps))
        # TV of a sample to its own law: mean at most sqrt(8 / n) / 2, and changing one draw moves it by 1 / n.
        assert total_variation(drawn, truth) < math.sqrt(8 / count) / 2 + 3 / math.sqrt(2 * count)


@pytest.mark.parametrize("target", ["z0", "z_prev"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_targets_oracles_draw_the_same_samples_at_any_temperature(target: Target, temperature: float) -> None:
    schedule, p, index = make_schedule("cosine", 32), toy_distribution(4), torch.arange(4000)
    config = SamplingConfig(steps=32, temperature=temperature)
    mine, flip = (
        sample_codes(Oracle(p, schedule, each), (1, 3), None, index, schedule, config, 0, each)
        for each in (target, "flip")
    )
    assert float((mine == flip).all(-1).float().mean()) > 0.998  # a bit may tip where the rounding of float32 decides


def test_guidance_works_on_the_evidence_of_every_target() -> None:
    schedule, index = make_schedule("linear", 16), torch.arange(4000)
    strong, weak = toy_distribution(4), toy_distribution(5)

    def guided(target: Target) -> Tensor:
        conditional, unconditional = Oracle(strong, schedule, target), Oracle(weak, schedule, target)

        def network(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            known, null = conditional(z, time, None), unconditional(z, time, None)
            return torch.where(labels[:, None, None] < 0, null, known)

        config = SamplingConfig(steps=16, guidance=2.0)
        labels = torch.zeros(len(index), dtype=torch.int64)
        return sample_codes(network, (1, 3), labels, index, schedule, config, 0, target)

    flip = guided("flip")
    for target in ("z0", "z_prev"):
        assert float((guided(target) == flip).all(-1).float().mean()) > 0.998


def test_a_network_of_single_steps_must_take_them_all() -> None:
    schedule, index = make_schedule("linear", 16), torch.arange(2)
    oracle = Oracle(toy_distribution(0), schedule, "z_prev")
    with pytest.raises(ValueError, match=r"8 sampling steps.*z_prev.*take all T = 16.*flip or z0"):
        sample_codes(oracle, (1, 3), None, index, schedule, SamplingConfig(steps=8), 0, "z_prev")


# --- Guidance, temperature, the last step -----------------------------------------------------------------------------


def linear_in_label(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return z * 3 + time[:, None, None] + labels[:, None, None]


def test_guidance_extrapolates_from_the_null_class() -> None:
    z, time, labels = torch.rand(5, 2, 3), torch.rand(5), torch.arange(5)
    conditional = linear_in_label(z, time, labels)
    unconditional = linear_in_label(z, time, torch.full((5,), -1))
    for w in (0.5, 2.0):
        truth = (1 + w) * conditional - w * unconditional
        torch.testing.assert_close(guided_evidence(linear_in_label, z, time, labels, w), truth)
        torch.testing.assert_close(truth, conditional + w * (labels[:, None, None] + 1.0))


def test_guidance_0_is_no_guidance_bitwise_and_small_guidance_is_near_it() -> None:
    schedule, index, labels = make_schedule("linear", 16), torch.arange(64), torch.arange(64) % 3
    z, time = torch.rand(64, 2, 3), torch.rand(64)
    assert torch.equal(guided_evidence(elementwise, z, time, labels, 0.0), elementwise(z, time, labels))
    torch.testing.assert_close(guided_evidence(elementwise, z, time, labels, 1e-6), elementwise(z, time, labels))
    plain, none, strong = (
        sample_codes(elementwise, (2, 8), labels, index, schedule, SamplingConfig(steps=8, guidance=w), 0)
        for w in (0.0, 1e-9, 4.0)
    )
    assert torch.equal(plain, none)
    assert not torch.equal(plain, strong)


def test_without_labels_guidance_changes_nothing() -> None:
    schedule, index = make_schedule("linear", 16), torch.arange(8)
    draws = [
        sample_codes(elementwise, (2, 8), None, index, schedule, SamplingConfig(guidance=w), 0) for w in (0.0, 3.0)
    ]
    assert torch.equal(draws[0], draws[1])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    schedule, labels = make_schedule("cosine", 64), torch.arange(64) % 4 - 1
    config = SamplingConfig(steps=16, guidance=1.5)

    def draw(part: slice) -> Tensor:
        return sample_codes(elementwise, (4, 8), labels[part], torch.arange(64)[part], schedule, config, 9)

    whole = draw(slice(None))
    assert 0.1 < float(whole.mean()) < 0.9
    for size in (1, 7):
        parts = [draw(slice(start, start + size)) for start in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(code.flatten().tolist()) for code in whole}) == 64  # and no two are alike


def test_the_seed_changes_the_samples() -> None:
    schedule, index = make_schedule("linear", 16), torch.arange(8)
    first, second = (sample_codes(elementwise, (4, 8), None, index, schedule, SamplingConfig(), s) for s in (0, 1))
    assert not torch.equal(first, second)


def test_the_mode_of_the_last_step_thresholds_r_at_one_half() -> None:
    # One step from pure noise to the code: r = sigmoid(evidence), since k_T = 0.
    schedule, index = make_schedule("linear", 4), torch.arange(100)
    evidence = torch.tensor([-0.1, 0.1, -5.0, 5.0])
    config = SamplingConfig(steps=1, temperature=1.0, final="mode")
    z = sample_codes(lambda z, time, labels: evidence.expand_as(z), (1, 4), None, index, schedule, config, 0)
    start = (uniform(0, "sampling start", index, 4) < 0.5).float().view(-1, 1, 4)
    flipped = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert torch.equal(z, (start - flipped).abs())
    sampled = SamplingConfig(steps=1, temperature=1.0)
    drawn = sample_codes(lambda z, time, labels: evidence.expand_as(z), (1, 4), None, index, schedule, sampled, 0)
    share = (drawn != start).float().mean(0).flatten()
    assert (share - torch.sigmoid(evidence)).abs().max() < 4 * math.sqrt(0.25 / 100)


def test_a_vanishing_temperature_makes_evidence_decide() -> None:
    # The evidence for z_0 = target is that every bit that differs from it is flipped.
    schedule, index = make_schedule("cosine", 64), torch.arange(50)
    target = (uniform(0, "target", torch.arange(1), 32) < 0.5).float().view(4, 8)

    def towards(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return 2 * (2 * (z - target).abs() - 1)

    for steps in (1, 4, 64):
        cold = sample_codes(towards, (4, 8), None, index, schedule, SamplingConfig(steps=steps, temperature=1e-3), 0)
        warm = sample_codes(towards, (4, 8), None, index, schedule, SamplingConfig(steps=steps, temperature=1.0), 0)
        assert (cold == target).all()
        assert not (warm == target).all()


def test_one_step_flips_with_the_tempered_probability() -> None:
    schedule, index = make_schedule("linear", 4), torch.arange(5000)
    config = SamplingConfig(steps=1, temperature=0.5)
    z = sample_codes(lambda z, time, labels: torch.full_like(z, 0.4), (1, 8), None, index, schedule, config, 0)
    start = (uniform(0, "sampling start", index, 8) < 0.5).float().view(-1, 1, 8)
    r = reverse_flip_probability(torch.sigmoid(torch.tensor(0.8)), 1.0, 0.0)
    assert abs(float((z != start).float().mean()) - float(r)) < 4 * math.sqrt(0.25 / 40_000)


def test_time_enters_as_t_over_the_steps_of_training_on_every_grid() -> None:
    schedule = make_schedule("cosine", 64)
    for steps in (4, 16, 64):
        seen: list[float] = []

        def watching(z: Tensor, time: Tensor, labels: Tensor | None, seen: list[float] = seen) -> Tensor:
            seen.append(float(time[0]))
            return elementwise(z, time, labels)

        sample_codes(watching, (1, 8), None, torch.arange(2), schedule, SamplingConfig(steps=steps), 0)
        assert seen == [t / 64 for t in schedule.grid(steps)[:-1]]


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("temperature", 0.0), ("guidance", -1.0)])
def test_a_bad_setting_is_named_with_its_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{field} is {value}"):
        SamplingConfig(**{field: value})  # pyright: ignore[reportArgumentType]
