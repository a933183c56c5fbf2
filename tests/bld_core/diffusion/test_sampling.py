"""The reverse process, against exact distributions over the 8 states of 3-bit toys."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from bld_core.diffusion.process import Calibration, Target, calibrate, reverse_flip_probability
from bld_core.diffusion.sampling import (
    Known,
    SampleSpec,
    SamplingConfig,
    guided_output,
    reverse_process,
    sample_codes,
)
from bld_core.diffusion.schedule import make_schedule
from bld_core.noise import uniform
from tests.bld_core.toys import (
    SCHEDULES,
    STATES,
    Oracle,
    TokenOracle,
    chain_distribution,
    conditional_distributions,
    inpainting_distributions,
    oracle_evidence,
    perturb,
    state_number,
    tiny_prior,
    total_variation,
    toy_distribution,
    toy_process,
)

SEEDS = range(6)
WAYS: list[tuple[Target, Calibration]] = [
    ("flip", "bayes"),
    ("z0", "bayes"),
    ("z_prev", "bayes"),
    ("flip", "none"),
    ("z0", "none"),
]


def elementwise(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    """A denoiser that judges every bit alone, so that a batch cannot change its arithmetic."""
    shift = 0.0 if labels is None else labels[:, None, None] * 0.5
    return (1 - 2 * z) * (0.7 + time[:, None, None]) + shift


# --- The distribution that the chain ends in --------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "calibration"), WAYS)
@pytest.mark.parametrize(("name", "bound"), [("linear", 0.003), ("cosine", 0.003), ("sigmoid", 0.005)])
def test_256_exact_steps_reach_the_true_distribution(
    name: str, bound: float, target: Target, calibration: Calibration
) -> None:
    process = toy_process(name, 256, target, calibration)
    for seed in SEEDS:
        p = toy_distribution(seed)
        assert total_variation(chain_distribution(p, process, process.schedule.grid(256)), p) <= bound


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_targets_oracles_make_the_same_chain(name: str) -> None:
    p, flip = toy_distribution(3), toy_process(name, 64)
    for target, calibration in WAYS:
        process = toy_process(name, 64, target, calibration)
        for grid in (flip.schedule.grid(64), flip.schedule.grid(7), [64, 0]):
            found = chain_distribution(p, process, grid)
            torch.testing.assert_close(found, chain_distribution(p, flip, grid), rtol=0, atol=1e-12)


def test_the_error_halves_each_time_the_steps_double() -> None:
    for seed in SEEDS:
        p = toy_distribution(seed)
        chains = (toy_process("linear", steps) for steps in (16, 32, 64, 128))
        errors = [
            total_variation(chain_distribution(p, chain, chain.schedule.grid(chain.schedule.steps)), p)
            for chain in chains
        ]
        for coarse, fine in itertools.pairwise(errors):
            assert fine / coarse == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["k", "t"])
def test_the_strided_grid_of_all_steps_is_the_plain_chain(name: str, spacing: Literal["k", "t"]) -> None:
    process = toy_process(name, 64)
    k, p = process.schedule.k.tolist(), toy_distribution(0)
    now = torch.full((8,), 1 / 8, dtype=torch.float64)
    for t in range(64, 0, -1):  # Eq. 4 and Bayes' rule for each bit, one step at a time
        beta = 1 - k[t] / k[t - 1]
        r = torch.sigmoid(calibrate(oracle_evidence(p, k[t]), k[t]))
        early, late = (1 - k[t - 1]) / 2, beta / 2  # flipped before t - 1, flipped in this step
        flipped = late * (1 - early) / (late * (1 - early) + (1 - late) * early)
        clean = late * early / (late * early + (1 - late) * (1 - early))
        change = (r * flipped + (1 - r) * clean)[:, None]
        now = now @ torch.where(STATES[:, None] != STATES[None], change, 1 - change).prod(-1)
    torch.testing.assert_close(
        chain_distribution(p, process, process.schedule.grid(64, spacing)), now, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("name", "steps"), [("linear", 64), ("cosine", 5)])
def test_sample_codes_draws_from_the_exact_chain(name: str, steps: int) -> None:
    count, process = 40_000, toy_process(name, 64)
    for seed in (0, 1):
        p = toy_distribution(seed)
        config = SamplingConfig(steps=steps, temperature=1.0)
        z = sample_codes(Oracle(p, process), process, (1, 3), SampleSpec(torch.arange(count), seed=seed), config)
        drawn = torch.bincount(state_number(z).flatten(), minlength=8).double() / count
        truth = chain_distribution(p, process, process.schedule.grid(steps))
        # TV of a sample to its own law: mean at most sqrt(8 / n) / 2, and changing one draw moves it by 1 / n.
        assert total_variation(drawn, truth) < math.sqrt(8 / count) / 2 + 3 / math.sqrt(2 * count)


@pytest.mark.parametrize("target", ["z0", "z_prev"])
@pytest.mark.parametrize(("temperature", "steps"), [(1.0, 32), (0.8, 32), (0.8, 5)])
def test_the_targets_oracles_draw_the_same_samples_at_any_temperature(
    target: Target, temperature: float, steps: int
) -> None:
    processes = [toy_process("cosine", 32, each) for each in (target, "flip")]
    p, index = toy_distribution(4), torch.arange(4000)
    config = SamplingConfig(steps=steps, temperature=temperature)
    mine, flip = (sample_codes(Oracle(p, process), process, (1, 3), SampleSpec(index), config) for process in processes)
    assert float((mine == flip).all(-1).float().mean()) > 0.998  # a bit may tip where the rounding of float32 decides


def test_guidance_works_on_the_evidence_of_every_target() -> None:
    index = torch.arange(4000)
    strong, weak = toy_distribution(4), toy_distribution(5)

    def guided(target: Target) -> Tensor:
        process = toy_process("linear", 16, target)
        conditional, unconditional = Oracle(strong, process), Oracle(weak, process)

        def network(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            known, null = conditional(z, time, None), unconditional(z, time, None)
            return torch.where(labels[:, None, None] < 0, null, known)

        config = SamplingConfig(steps=16, guidance=2.0)
        labels = torch.zeros(len(index), dtype=torch.int64)
        return sample_codes(network, process, (1, 3), SampleSpec(index, labels), config)

    flip = guided("flip")
    for target in ("z0", "z_prev"):
        assert float((guided(target) == flip).all(-1).float().mean()) > 0.998


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
        torch.testing.assert_close(guided_output(linear_in_label, z, time, labels, w), truth)
        torch.testing.assert_close(truth, conditional + w * (labels[:, None, None] + 1.0))


def test_guidance_0_is_no_guidance_bitwise_and_small_guidance_is_near_it() -> None:
    process, index, labels = toy_process("linear", 16), torch.arange(64), torch.arange(64) % 3
    z, time = torch.rand(64, 2, 3), torch.rand(64)
    assert torch.equal(guided_output(elementwise, z, time, labels, 0.0), elementwise(z, time, labels))
    torch.testing.assert_close(guided_output(elementwise, z, time, labels, 1e-6), elementwise(z, time, labels))
    plain, none, strong = (
        sample_codes(elementwise, process, (2, 8), SampleSpec(index, labels), SamplingConfig(steps=8, guidance=w))
        for w in (0.0, 1e-9, 4.0)
    )
    assert torch.equal(plain, none)
    assert not torch.equal(plain, strong)


def test_without_labels_guidance_changes_nothing() -> None:
    process, index = toy_process("linear", 16), torch.arange(8)
    draws = [
        sample_codes(elementwise, process, (2, 8), SampleSpec(index), SamplingConfig(guidance=w)) for w in (0.0, 3.0)
    ]
    assert torch.equal(draws[0], draws[1])


def test_guidance_works_within_its_interval_alone_and_costs_nothing_outside() -> None:
    process, index, labels = toy_process("linear", 16), torch.arange(64), torch.arange(64) % 3
    guided: dict[float, bool] = {}

    def watching(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        guided[float(time[0])] = len(z) == 2 * len(index)
        return elementwise(z, time, labels)

    def draw(**settings: Any) -> Tensor:
        return sample_codes(watching, process, (2, 8), SampleSpec(index, labels), SamplingConfig(**settings))

    whole, plain = draw(guidance=2.0), draw()
    assert torch.equal(draw(guidance=2.0, guidance_interval=[0.0, 1.0]), whole)
    assert all(draw(guidance=2.0, guidance_interval=[0.5, 0.75]).flatten().isfinite())
    assert {time for time, both in guided.items() if both} == {t / 16 for t in (9, 10, 11, 12)}
    # Where no step lies in the interval, it is sampling without guidance.
    assert torch.equal(draw(guidance=2.0, guidance_interval=[0.0, 0.03]), plain)
    assert not torch.equal(whole, plain)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    process, labels = toy_process("cosine", 64), torch.arange(64) % 4 - 1
    config = SamplingConfig(steps=16, guidance=1.5)

    def draw(part: slice) -> Tensor:
        return sample_codes(elementwise, process, (4, 8), SampleSpec(torch.arange(64)[part], labels[part], 9), config)

    whole = draw(slice(None))
    assert 0.1 < float(whole.mean()) < 0.9
    for size in (1, 7):
        parts = [draw(slice(start, start + size)) for start in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(code.flatten().tolist()) for code in whole}) == 64  # and no two are alike


def test_in_other_batches_only_rounding_differs() -> None:
    prior = tiny_prior(classes=4, tokens=16, bits=16, layers=3).eval()
    perturb(prior)
    process, index, labels = toy_process("linear", 64), torch.arange(64), torch.arange(64) % 4
    config = SamplingConfig(steps=16, guidance=1.0)
    whole = sample_codes(prior, process, (16, 16), SampleSpec(index, labels, 3), config)
    for size in (1, 7):
        parts = [
            sample_codes(prior, process, (16, 16), SampleSpec(i, y, 3), config)
            for i, y in zip(index.split(size), labels.split(size), strict=True)
        ]
        assert float((torch.cat(parts) == whole).float().mean()) >= 0.999


def test_the_seed_changes_the_samples() -> None:
    process, index = toy_process("linear", 16), torch.arange(8)
    first, second = (
        sample_codes(elementwise, process, (4, 8), SampleSpec(index, seed=s), SamplingConfig()) for s in (0, 1)
    )
    assert not torch.equal(first, second)


def test_the_mode_of_the_last_step_thresholds_r_at_one_half() -> None:
    # One step from pure noise to the code: r = sigmoid(evidence), since k_T = 0.
    process, index = toy_process("linear", 4), torch.arange(100)
    evidence = torch.tensor([-0.1, 0.1, -5.0, 5.0])
    config = SamplingConfig(steps=1, temperature=1.0, final="mode")
    z = sample_codes(lambda z, time, labels: evidence.expand_as(z), process, (1, 4), SampleSpec(index), config)
    start = (uniform(0, "sampling start", index, 4) < 0.5).float().view(-1, 1, 4)
    flipped = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert torch.equal(z, (start - flipped).abs())
    sampled = SamplingConfig(steps=1, temperature=1.0)
    drawn = sample_codes(lambda z, time, labels: evidence.expand_as(z), process, (1, 4), SampleSpec(index), sampled)
    share = (drawn != start).float().mean(0).flatten()
    assert (share - torch.sigmoid(evidence)).abs().max() < 4 * math.sqrt(0.25 / 100)


def test_a_vanishing_temperature_makes_evidence_decide() -> None:
    # The evidence for z_0 = target is that every bit that differs from it is flipped.
    process, index = toy_process("cosine", 64), torch.arange(50)
    target = (uniform(0, "target", torch.arange(1), 32) < 0.5).float().view(4, 8)

    def towards(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return 2 * (2 * (z - target).abs() - 1)

    for steps in (1, 4, 64):
        cold = sample_codes(towards, process, (4, 8), SampleSpec(index), SamplingConfig(steps=steps, temperature=1e-3))
        warm = sample_codes(towards, process, (4, 8), SampleSpec(index), SamplingConfig(steps=steps, temperature=1.0))
        assert (cold == target).all()
        assert not (warm == target).all()


def test_one_step_flips_with_the_tempered_probability() -> None:
    process, index = toy_process("linear", 4), torch.arange(5000)
    config = SamplingConfig(steps=1, temperature=0.5)
    z = sample_codes(lambda z, time, labels: torch.full_like(z, 0.4), process, (1, 8), SampleSpec(index), config)
    start = (uniform(0, "sampling start", index, 8) < 0.5).float().view(-1, 1, 8)
    r = reverse_flip_probability(torch.sigmoid(torch.tensor(0.8)), 1.0, 0.0)
    assert abs(float((z != start).float().mean()) - float(r)) < 4 * math.sqrt(0.25 / 40_000)


def test_time_enters_as_t_over_the_steps_of_training_on_every_grid() -> None:
    process = toy_process("cosine", 64)
    for steps in (4, 16, 64):
        seen: list[float] = []

        def watching(z: Tensor, time: Tensor, labels: Tensor | None, seen: list[float] = seen) -> Tensor:
            seen.append(float(time[0]))
            return elementwise(z, time, labels)

        sample_codes(watching, process, (1, 8), SampleSpec(torch.arange(2)), SamplingConfig(steps=steps))
        assert seen == [t / 64 for t in process.schedule.grid(steps)[:-1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        *(("temperature", value) for value in (0.0, math.inf, math.nan)),
        *(("guidance", value) for value in (-1.0, math.inf, math.nan)),
        ("resample", -1),
    ],
)
def test_a_bad_setting_is_named_with_its_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` is {value}"):
        SamplingConfig(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("interval", [[0.5], [0.5, 0.5], [-0.1, 1.0], [0.0, 1.1], [math.nan, 1.0]])
def test_a_bad_interval_of_guidance_is_named(interval: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`guidance_interval` is \["):
        SamplingConfig(guidance_interval=interval)


# --- Every state, any grid --------------------------------------------------------------------------------------------


def test_the_states_begin_with_the_start_noise_and_end_with_the_code() -> None:
    process, index, config = toy_process("cosine", 64), torch.arange(12), SamplingConfig(steps=16)
    samples = SampleSpec(index, seed=3)
    states = list(reverse_process(elementwise, process, (4, 8), samples, config))
    assert len(states) == 17
    assert torch.equal(states[0], (uniform(3, "sampling start", index, 32) < 0.5).float().view(-1, 4, 8))
    assert torch.equal(states[-1], sample_codes(elementwise, process, (4, 8), samples, config))
    # A state at t is one step from the next: what stands in an earlier one is never changed afterwards.
    shorter = SamplingConfig(grid=[*process.schedule.grid(16)[:8], 0])
    for a, b in zip(states[:8], reverse_process(elementwise, process, (4, 8), samples, shorter), strict=False):
        assert torch.equal(a, b)


def test_a_given_grid_is_the_one_that_is_visited() -> None:
    process, index, p = toy_process("linear", 64), torch.arange(40_000), toy_distribution(2)
    for spacing in ("k", "t"):
        by_name = SamplingConfig(steps=16, spacing=spacing)
        given = SamplingConfig(grid=process.schedule.grid(16, spacing), steps=3)
        assert by_name.make_grid(process.schedule) == given.make_grid(process.schedule)
        codes = [
            sample_codes(elementwise, process, (4, 8), SampleSpec(index[:20], seed=1), c) for c in (by_name, given)
        ]
        assert torch.equal(*codes)
    grid = [64, 60, 33, 7, 1, 0]
    config = SamplingConfig(grid=grid, temperature=1.0)
    drawn = torch.bincount(
        state_number(sample_codes(Oracle(p, process), process, (1, 3), SampleSpec(index), config)).flatten(),
        minlength=8,
    )
    truth = chain_distribution(p, process, grid)
    assert total_variation(drawn / len(index), truth) < math.sqrt(8 / len(index)) / 2 + 3 / math.sqrt(2 * len(index))


@pytest.mark.parametrize("grid", [[64], [64, 32], [64, 32, 32, 0], [64, 10, 20, 0], [0]])
def test_a_grid_that_does_not_fall_from_t_to_0_is_refused(grid: list[int]) -> None:
    with pytest.raises(ValueError, match="`grid` "):
        SamplingConfig(grid=grid).make_grid(make_schedule("linear", 64))


def test_a_grid_of_another_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"starts at 32.*T = 64"):
        SamplingConfig(grid=[32, 0]).make_grid(make_schedule("linear", 64))


# --- Inpainting: the distribution that it ends in ---------------------------------------------------------------------


def inpainting_errors(steps: int, jumps: int | None, name: str = "linear") -> Tensor:
    """TV to the true conditional, for each toy, each bit that may be known and each of its values."""
    schedule = make_schedule(name, steps)
    toys = [toy_distribution(seed) for seed in SEEDS]
    differences = [inpainting_distributions(p, schedule, jumps) - conditional_distributions(p) for p in toys]
    return torch.stack(differences).abs().sum(-1) / 2


def test_the_conditioned_chain_reaches_the_true_conditional() -> None:
    assert inpainting_errors(256, None).max() <= 0.003
    coarse, fine = (inpainting_errors(steps, None).mean() for steps in (16, 32))
    assert float(fine / coarse) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("steps", "jumps", "mean"), [(256, 0, 0.097), (64, 0, 0.100), (64, 1, 0.067), (64, 3, 0.043), (64, 9, 0.024)]
)
def test_replacement_is_biased_however_many_steps_and_jumps_lower_it(steps: int, jumps: int, mean: float) -> None:
    errors = inpainting_errors(steps, jumps)
    assert float(errors.mean()) == pytest.approx(mean, abs=0.001)
    assert float(errors.max()) > 0.05


@pytest.mark.parametrize(("method", "jumps"), [("conditioned", None), ("replacement", 0), ("replacement", 2)])
def test_inpainting_draws_from_its_exact_chain(
    method: Literal["conditioned", "replacement"], jumps: int | None
) -> None:
    count, process, p = 20_000, toy_process("linear", 8), toy_distribution(0)
    oracle = TokenOracle(p, process)
    config = SamplingConfig(steps=8, temperature=1.0, inpainting=method, resample=jumps or 0)
    truth = inpainting_distributions(p, process.schedule, jumps)
    for bit, value in ((0, 1), (2, 0)):
        known = Known(torch.full((count, 3, 1), float(value)), (torch.arange(3) == bit).expand(count, -1))

        def denoiser(
            z: Tensor, time: Tensor, labels: Tensor | None, marks: Tensor | None = None, b: int = bit, v: int = value
        ) -> Tensor:
            if marks is not None:
                assert (z[:, b, 0] == v).all()  # known tokens enter clean
            return oracle(z, time, labels, marks)

        z = sample_codes(denoiser, process, (3, 1), SampleSpec(torch.arange(count), seed=5), config, known).squeeze(-1)
        assert (z[:, bit] == value).all()
        drawn = torch.bincount(state_number(z), minlength=8).double() / count
        assert total_variation(drawn, truth[bit, value]) < math.sqrt(8 / count) / 2 + 3 / math.sqrt(2 * count)


@pytest.mark.parametrize("target", ["z0", "z_prev"])
@pytest.mark.parametrize(("method", "jumps"), [("conditioned", 0), ("replacement", 0), ("replacement", 2)])
def test_the_targets_oracles_complete_alike(
    target: Target, method: Literal["conditioned", "replacement"], jumps: int
) -> None:
    processes = [toy_process("cosine", 16, each) for each in (target, "flip")]
    count, p = 3000, toy_distribution(4)
    config = SamplingConfig(steps=16, temperature=0.8, inpainting=method, resample=jumps)
    index = torch.arange(count)
    mask = torch.eye(3, dtype=torch.bool)[index % 3]
    known = Known((index // 3 % 2).float()[:, None, None].expand(-1, 3, 1), mask)
    mine, flip = (
        sample_codes(TokenOracle(p, process), process, (3, 1), SampleSpec(index), config, known)
        for process in processes
    )
    assert torch.equal(mine[mask], known.z[mask])
    assert float((mine == flip).flatten(1).all(1).float().mean()) > 0.998  # as far as float32 rounds alike
    process = processes[0]
    plain = sample_codes(TokenOracle(p, process), process, (3, 1), SampleSpec(index), config)
    assert float((mine == plain).flatten(1).all(1).float().mean()) < 0.9


# --- Inpainting: what is known, what is keyed -------------------------------------------------------------------------

METHODS: list[SamplingConfig] = [
    SamplingConfig(steps=8, inpainting="conditioned"),
    *(SamplingConfig(steps=8, inpainting="replacement", resample=jumps) for jumps in (0, 1, 3)),
]


def marked(z: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None = None) -> Tensor:
    """An elementwise denoiser that takes marks, but judges by the sample's other tokens, too."""
    mark = 0.0 if known is None else known[..., None] * 0.3
    return elementwise(z, time, labels) + (z.sum(dim=(1, 2), keepdim=True) - 16) * 0.25 + mark


def some_known(count: int, share: float) -> Known:
    index = torch.arange(count)
    z = (uniform(0, "toy code", index, 32) < 0.5).float().view(-1, 4, 8)
    return Known(z, uniform(0, "toy mask", index, 4) < share)


@pytest.mark.parametrize("config", METHODS)
def test_known_tokens_come_back_and_everything_known_is_the_code(config: SamplingConfig) -> None:
    process, index = toy_process("cosine", 16), torch.arange(20)
    for share in (0.5, 1.0):
        known = some_known(20, share)
        z = sample_codes(marked, process, (4, 8), SampleSpec(index, seed=1), config, known)
        assert torch.equal(z[known.mask], known.z[known.mask])
    assert torch.equal(z, known.z)


@pytest.mark.parametrize("config", METHODS)
def test_with_nothing_known_it_is_plain_sampling_bitwise(config: SamplingConfig) -> None:
    process, index, labels = toy_process("cosine", 16), torch.arange(20), torch.arange(20) % 3
    known, samples = some_known(20, 0.0), SampleSpec(index, labels, 1)
    plain = sample_codes(marked, process, (4, 8), samples, config)
    assert torch.equal(sample_codes(marked, process, (4, 8), samples, config, known), plain)
    prior = tiny_prior(known_share=0.5)
    perturb(prior)
    plain = sample_codes(prior, process, (4, 8), samples, config)
    assert torch.equal(sample_codes(prior, process, (4, 8), samples, config, known), plain)
    known.mask[7] = True  # and that of one sample is not the others' business
    mixed = sample_codes(marked, process, (4, 8), samples, config, known)
    assert torch.equal(mixed[:7], sample_codes(marked, process, (4, 8), samples, config)[:7])


@pytest.mark.parametrize("config", METHODS)
def test_bits_of_unknown_tokens_are_never_looked_at(config: SamplingConfig) -> None:
    process, index, known = toy_process("linear", 16), torch.arange(20), some_known(20, 0.5)
    other = Known(torch.where(known.mask[..., None], known.z, 1 - known.z), known.mask)
    draws = [
        sample_codes(marked, process, (4, 8), SampleSpec(index, seed=1), config, given) for given in (known, other)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("config", METHODS)
def test_an_inpainted_sample_does_not_depend_on_its_batch(config: SamplingConfig) -> None:
    process, known, labels = toy_process("linear", 16), some_known(24, 0.4), torch.arange(24) % 4 - 1

    def draw(part: slice) -> Tensor:
        given, samples = Known(known.z[part], known.mask[part]), SampleSpec(torch.arange(24)[part], labels[part], 9)
        return sample_codes(marked, process, (4, 8), samples, config, given)

    whole = draw(slice(None))
    for size in (1, 7):
        assert torch.equal(torch.cat([draw(slice(start, start + size)) for start in range(0, 24, size)]), whole)


def test_every_jump_has_its_own_noise_and_is_one_more_pass() -> None:
    process, known, index = toy_process("linear", 16), some_known(20, 0.5), torch.arange(20)
    codes: list[Tensor] = []
    for jumps in (0, 1, 2, 3):
        times: list[float] = []

        def watching(z: Tensor, time: Tensor, labels: Tensor | None, times: list[float] = times) -> Tensor:
            times.append(float(time[0]))
            return marked(z, time, labels)

        config = SamplingConfig(steps=4, inpainting="replacement", resample=jumps)
        codes.append(sample_codes(watching, process, (4, 8), SampleSpec(index), config, known))
        assert times == [t / 16 for t in (16, 12, 8, 4) for _ in range(jumps + 1)]
    for first, second in itertools.combinations(codes, 2):
        assert not torch.equal(first, second)


def test_replaced_tokens_have_the_noise_of_their_level() -> None:
    # In state z_t a known bit differs from the clean one with probability (1 - k_t) / 2.
    count, process = 4000, toy_process("cosine", 16)
    known = Known(torch.ones(count, 4, 8), torch.tensor([True, True, False, False]).expand(count, -1))
    config = SamplingConfig(steps=16, inpainting="replacement", resample=1)
    states = reverse_process(elementwise, process, (4, 8), SampleSpec(torch.arange(count)), config, known)
    for t, z in zip(range(16, -1, -1), states, strict=True):
        share = float((z[:, :2] != 1).float().mean())
        assert abs(share - (1 - float(process.schedule.k[t])) / 2) < 4 * math.sqrt(0.25 / (count * 16))


def test_guidance_marks_known_tokens_in_both_halves() -> None:
    z, time, labels = torch.rand(5, 4, 8), torch.rand(5), torch.arange(5)
    mask = some_known(5, 0.5).mask
    conditional = marked(z, time, labels, mask)
    unconditional = marked(z, time, torch.full((5,), -1), mask)
    truth = 3 * conditional - 2 * unconditional
    torch.testing.assert_close(guided_output(marked, z, time, labels, 2.0, mask), truth)
    assert not torch.allclose(guided_output(marked, z, time, labels, 2.0), truth)
