"""Groups of bits, jointly: the same as single bits where R = 0, and Bayes' rule by counting where not."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from bld_core.diffusion.bound import likelihood_bound
from bld_core.diffusion.groups import (
    bits_of,
    draw_flips,
    image_of_step,
    in_groups,
    joint_log_posterior,
    step_law,
    sums_of_bits,
    value_of,
)
from bld_core.diffusion.loss import (
    Step,
    joint_residual_loss,
    joint_vlb_loss,
    loss_terms,
    residual_loss,
    vlb_loss,
)
from bld_core.diffusion.process import (
    Calibration,
    CodeBatch,
    DiffusionProcess,
    Evidence,
    Target,
    output_size,
    reverse_flip_probability,
)
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig, sample_codes
from bld_core.diffusion.schedule import make_schedule
from bld_core.noise import uniform
from tests.bld_core.toys import SCHEDULES, TARGETS, GroupToy, group_toy, total_variation

PAIRS = ((0, 1), (0, 40), (31, 32), (5, 50), (63, 64), (20, 64), (0, 64))  # levels s, t of 64
ROWS, TOKENS, BITS = 3, 2, 16


def some_code(name: str, count: int = ROWS, shape: tuple[int, int] = (TOKENS, BITS)) -> Tensor:
    return (uniform(0, name, torch.arange(count), math.prod(shape)) < 0.5).double().view(-1, *shape)


def some_evidence(group: int, scale: float = 0.0) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(ROWS, TOKENS, BITS, generator=generator, dtype=torch.float64) * 2
    R = torch.randn(ROWS, TOKENS, BITS // group, 2**group, generator=generator, dtype=torch.float64)
    return Evidence(e, R * scale)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 8, 16])
def test_a_code_is_the_values_of_its_groups_and_back(group: int) -> None:
    z = some_code("z")
    v = value_of(z, group)
    assert torch.equal(bits_of(v, group).double(), z)
    first = "".join(str(int(bit)) for bit in z[1, 1, :group])
    assert int(v[1, 1, 0]) == int(first, 2)  # the first bit counts most


def test_what_independent_bits_say_of_a_value_is_a_sum() -> None:
    zero, one = torch.randn(2, ROWS, TOKENS, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = bits_of(torch.arange(256)[:, None, None], 8)[:, 0].bool()
    truth = torch.where(values, one[..., None, :], zero[..., None, :]).sum(-1)
    torch.testing.assert_close(sums_of_bits(zero, one), truth, rtol=0, atol=1e-12)


def test_a_value_is_drawn_where_its_uniform_falls_and_never_where_nothing_is() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0, 0.0])
    u = torch.tensor([0.0, 0.24, 0.25, 0.7, 0.75, 1 - 2.0**-24])
    log_p = p.log().expand(len(u), 1, 1, 8)
    assert value_of(draw_flips(log_p, u[:, None, None]), 3).flatten().tolist() == [1, 1, 3, 3, 4, 4]
    assert value_of(draw_flips(log_p, None), 3).flatten().tolist() == [3] * 6
    # However the sum rounds, the last uniform falls on a value.
    many = torch.randn(2000, 1, 1, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert int(value_of(draw_flips(many, torch.full((2000, 1, 1), 1 - 2.0**-24)), 8).min()) >= 200
    drawn = draw_flips(many[:1].expand(20_000, 1, 1, 256), uniform(0, "u", torch.arange(20_000), 1)[:, None])
    counts = torch.bincount(value_of(drawn, 8).flatten(), minlength=256) / 20_000
    assert total_variation(counts, many[0, 0, 0].exp()) < math.sqrt(256 / 20_000) / 2 + 3 / math.sqrt(40_000)


# --- R = 0 is g = 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("group", [2, 8])
def test_without_a_residual_the_losses_are_those_of_single_bits(
    group: int, name: str, dtype: torch.dtype, error: float
) -> None:
    k = make_schedule(name, 64).k.tolist()
    z_0, z_t = some_code("z").to(dtype), some_code("other").to(dtype)
    evidence, R = (part.to(dtype) for part in some_evidence(group) if part is not None)
    flip = (z_0 - z_t).abs()
    for s, t in PAIRS:
        log_p = joint_log_posterior(Evidence(evidence, R), z_t, k[t])
        for joint, single in (
            (joint_residual_loss(log_p, flip), residual_loss(evidence, flip, k[t])),
            (joint_vlb_loss(log_p, flip, k[s], k[t]), vlb_loss(evidence, flip, k[s], k[t])),
        ):
            torch.testing.assert_close(joint, in_groups(single, group).mean(-1), rtol=error, atol=error)


@pytest.mark.parametrize("calibration", ["bayes", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_without_a_residual_training_and_bound_are_those_of_single_bits(
    target: Target, calibration: Calibration
) -> None:
    schedule = make_schedule("cosine", 32)
    one, eight = (DiffusionProcess(schedule, target, calibration, group) for group in (1, 8))
    z_0, known = some_code("z", 40).float(), torch.arange(80).view(40, 2) % 3 == 0
    t = torch.arange(40) % 32 + 1

    def said(z: Tensor, time: Tensor, labels: Tensor | None, marks: Tensor | None = None) -> Tensor:
        return (1 - 2 * z) * (0.7 + time[:, None, None]) + z.roll(1, -1)

    def said_of_groups(z: Tensor, time: Tensor, labels: Tensor | None, marks: Tensor | None = None) -> Tensor:
        return torch.cat([said(z, time, labels), torch.zeros(*z.shape[:2], 512)], -1)

    codes, u = CodeBatch.numbered(z_0), uniform(0, "u", torch.arange(40), 32).view_as(z_0)
    for marks in (None, known):
        mine, other = (
            loss_terms(network, process, codes, Step(t, t // 2, u), known=marks)
            for network, process in ((said, one), (said_of_groups, eight))
        )
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-6)
    for grid in (None, schedule.grid(5), [32, 0]):
        mine = likelihood_bound(said, one, codes, grid)
        assert likelihood_bound(said_of_groups, eight, codes, grid).bits_per_bit == pytest.approx(
            mine.bits_per_bit, rel=1e-5
        )


def test_without_a_residual_the_chain_is_that_of_single_bits_and_so_are_the_draws() -> None:
    one, two = (group_toy(0, group, 16) for group in (1, 2))
    for s, t in ((0, 1), (0, 16), (3, 9), (15, 16)):
        k_s, k_t = float(one.process.schedule.k[s]), float(one.process.schedule.k[t])
        output = one.output(k_t)
        padded = torch.cat([output, torch.zeros(len(output), 2, 4, dtype=torch.float64)], -1)
        laws = one.reverse_law(output, k_s, k_t), two.reverse_law(padded, k_s, k_t)
        torch.testing.assert_close(*laws, rtol=0, atol=1e-12)

    def single(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return one(z, time, labels)

    def grouped(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return torch.cat([one(z, time, labels), torch.zeros(len(z), 2, 4)], -1)

    count = 40_000
    for steps in (1, 4):
        config, truth = SamplingConfig(steps=steps, temperature=1.0), one.chain(one.process.schedule.grid(steps))
        for network, process in ((single, one.process), (grouped, two.process)):  # the same uniforms, the same law
            z = sample_codes(network, process, (2, 2), SampleSpec(torch.arange(count)), config)
            assert_drawn_from(one.number(z), truth)


def assert_drawn_from(numbers: Tensor, truth: Tensor) -> None:
    """Whether draws follow a law: the mean TV is at most sqrt(states / n) / 2, and one draw moves it by 1 / n."""
    count = len(numbers)
    drawn = torch.bincount(numbers, minlength=len(truth)).double() / count
    assert total_variation(drawn, truth) < math.sqrt(len(truth) / count) / 2 + 3 / math.sqrt(2 * count)


# --- Butterflies, by counting -----------------------------------------------------------------------------------------


def counted_law(group: int, k_s: float, k_t: float) -> Tensor:
    """P(z_s XOR z_t = d | the flips f) of every two values, (f, d): a product over the bits, from A and B."""
    bits = bits_of(torch.arange(2**group)[:, None, None], group)[:, 0].double()
    change = reverse_flip_probability(bits, k_s, k_t)[:, None]
    return torch.where(bits[None] == 1, change, 1 - change).prod(-1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_butterflies_are_the_sum_over_all_values(group: int, name: str) -> None:
    schedule = make_schedule(name, 64)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(len(PAIRS), 2, 3, 2**group, generator=generator, dtype=torch.float64).softmax(-1)
    k_s, k_t = (schedule.signal(torch.tensor(level), p[..., 0]) for level in zip(*PAIRS, strict=True))
    each = image_of_step(p, step_law(k_s, k_t, p))  # each sample has levels of its own
    for i, (s, t) in enumerate(PAIRS):
        level_s, level_t = float(schedule.k[s]), float(schedule.k[t])
        truth = torch.einsum("nmf,fd->nmd", p[i], counted_law(group, level_s, level_t))
        torch.testing.assert_close(each[i], truth, rtol=0, atol=1e-12)
        alone = image_of_step(p[i : i + 1], step_law(level_s, level_t, p))[0]
        torch.testing.assert_close(alone, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [2, 8])
def test_the_joint_vlb_is_the_kl_by_counting_for_any_stride(group: int) -> None:
    k = make_schedule("linear", 64).k.tolist()
    z_0, z_t = some_code("z"), some_code("other")
    flip = (z_0 - z_t).abs()
    for s, t in PAIRS:
        log_p = joint_log_posterior(some_evidence(group, 1.0), z_t, k[t])
        table = counted_law(group, k[s], k[t])
        q, p = table[value_of(flip, group)], log_p.exp() @ table
        truth = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1) / group
        found = joint_vlb_loss(log_p, flip, k[s], k[t])
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
        if s == 0:
            torch.testing.assert_close(found, joint_residual_loss(log_p, flip), rtol=0, atol=1e-12)
        rounded = joint_vlb_loss(log_p.float(), flip.float(), k[s], k[t])
        torch.testing.assert_close(rounded.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [4, 64, 1024])
def test_losses_and_gradients_stay_finite_for_extreme_evidence_in_float32(name: str, steps: int) -> None:
    schedule = make_schedule(name, steps)
    k_t, k_s = schedule.k[1:, None, None], schedule.k[:-1, None, None]
    z_0, z_t = (some_code(name, steps, (1, 16)).float() for name in ("z", "other"))
    for size in (1.0, 10.0, 50.0):
        e = (torch.randn(steps, 1, 16, generator=torch.Generator().manual_seed(0)) * size).requires_grad_()
        R = (torch.randn(steps, 1, 2, 256, generator=torch.Generator().manual_seed(1)) * size).requires_grad_()
        log_p = joint_log_posterior(Evidence(e, R), z_t, k_t)
        flip = (z_0 - z_t).abs()
        residual = joint_residual_loss(log_p, flip)
        for loss in (residual, joint_vlb_loss(log_p, flip, k_s, k_t)):
            assert loss.isfinite().all()
            assert (loss < residual + 1e-4).all()  # a step tells no more than the whole code,
            torch.testing.assert_close(loss[0], residual[0])  # and the last step tells all of it
            assert (loss > -1e-5).all()
            for gradient in torch.autograd.grad(loss.sum(), (e, R), retain_graph=True):
                assert gradient.isfinite().all()


# --- The oracle -------------------------------------------------------------------------------------------------------


def test_the_oracles_joint_posterior_is_bayes_rule() -> None:
    # One token of three bits in one group: its posterior is that of the whole code.
    toy = group_toy(0, 3, 16, (1, 3))
    for k_t in toy.process.schedule.k[1:].tolist():
        weight = toy.p * toy.q(1.0, k_t).flatten(2).prod(-1)
        evidence = toy.process.evidence(toy.output(k_t), toy.states, k_t)
        of_flips = joint_log_posterior(evidence, toy.states, k_t).exp().flatten(1)
        z = torch.arange(8)
        of_codes = of_flips.gather(1, z[:, None] ^ z)  # (z_t, z_0)
        torch.testing.assert_close(of_codes, weight / weight.sum(1, keepdim=True), rtol=0, atol=1e-12)


def independent_tokens(group: int, steps: int) -> GroupToy:
    """Two tokens of two bits that say nothing of one another, though the bits of a token do."""
    first, second = torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(-1)
    process = DiffusionProcess(make_schedule("linear", steps), group=group)
    return GroupToy((first[:, None] * second).flatten(), (2, 2), process)


def test_one_step_is_exact_where_tokens_are_independent() -> None:
    one, two = (independent_tokens(group, 8) for group in (1, 2))
    for grid in ([8, 0], [8, 3, 0], list(range(8, -1, -1))):
        torch.testing.assert_close(two.chain(grid), two.p, rtol=0, atol=1e-12)
    assert total_variation(one.chain([8, 0]), one.p) > 0.05  # which single bits are not
    entropy = -float((two.p * two.p.log2()).sum()) / 4
    assert two.bound([8, 0]) == pytest.approx(entropy, abs=1e-12)
    assert one.bound([8, 0]) > entropy + 0.01
    z = sample_codes(two, two.process, (2, 2), SampleSpec(torch.arange(40_000)), SamplingConfig(steps=1, temperature=1))
    assert_drawn_from(two.number(z), two.p)


def test_256_steps_reach_the_truth_and_half_the_steps_have_twice_the_error() -> None:
    for seed in range(3):
        errors = {}
        for group, steps in ((1, 16), (2, 16), (2, 32), (2, 64), (2, 256)):
            toy = group_toy(seed, group, steps)
            errors[group, steps] = total_variation(toy.chain(toy.process.schedule.grid(steps)), toy.p)
        assert errors[2, 256] <= 0.003
        assert errors[2, 16] < errors[1, 16]
        for coarse, fine in ((16, 32), (32, 64)):
            assert errors[2, fine] / errors[2, coarse] == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_samples_follow_the_exact_law_of_their_chain(steps: int) -> None:
    toy = group_toy(1, 2, 16)
    z = sample_codes(
        toy, toy.process, (2, 2), SampleSpec(torch.arange(40_000)), SamplingConfig(steps=steps, temperature=1)
    )
    assert_drawn_from(toy.number(z), toy.chain(toy.process.schedule.grid(steps)))


@pytest.mark.parametrize("count", [1, 5, 16])
def test_the_bound_measures_the_steps_of_its_grid(count: int) -> None:
    toy = group_toy(2, 2, 16)
    u = uniform(0, "codes", torch.arange(4000), 1)[:, 0].double()
    z_0 = toy.states[torch.searchsorted(toy.p.cumsum(0), u).clamp(max=15)].float()
    grid = toy.process.schedule.grid(count)
    bound = likelihood_bound(toy, toy.process, CodeBatch.numbered(z_0), grid)
    assert abs(bound.bits_per_bit - toy.bound(grid)) < 4 * bound.standard_error
    assert bound.standard_error < 0.02


# --- Temperature, guidance, the last step -----------------------------------------------------------------------------

VALUES = bits_of(torch.arange(256)[:, None, None], 8)[:, 0]


def opinion(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    """The same for every code: of l and of R; those of a class are others."""
    shift = torch.zeros(len(z)) if labels is None else labels.float()
    l_BNC = torch.linspace(-1, 1, 8) + 0.2 * shift[:, None, None]
    R = torch.randn(256, generator=torch.Generator().manual_seed(0)) * (1 + shift[:, None, None])
    return torch.cat([l_BNC, R], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_temperature_divides_and_guidance_mixes_both_parts(temperature: float, guidance: float) -> None:
    process, index = DiffusionProcess(make_schedule("linear", 4), group=8), torch.arange(20_000)
    labels = torch.ones(len(index), dtype=torch.int64)
    config = SamplingConfig(steps=1, temperature=temperature, guidance=guidance)
    z = sample_codes(opinion, process, (1, 8), SampleSpec(index, labels), config)
    one, zero = torch.zeros(1, 1, 8), torch.zeros(1)
    said, null = (opinion(one, zero, torch.tensor([label])).flatten() for label in (1, -1))
    mixed = ((1 + guidance) * said - guidance * null) / temperature
    truth = (VALUES @ mixed[:8] + mixed[8:]).softmax(0)  # k_T = 0: nothing is known of z_0 but this
    drawn = torch.bincount(value_of(z, 8).flatten(), minlength=256) / len(index)
    assert total_variation(drawn, truth) < math.sqrt(256 / len(index)) / 2 + 3 / math.sqrt(2 * len(index))
    cold = SamplingConfig(steps=4, temperature=1e-4, guidance=guidance)
    z = sample_codes(opinion, process, (1, 8), SampleSpec(index[:50], labels[:50]), cold)
    assert (value_of(z, 8) == truth.argmax()).all()


def test_the_mode_of_the_last_step_is_the_likeliest_value() -> None:
    process, index = DiffusionProcess(make_schedule("linear", 4), group=8), torch.arange(50)
    z = sample_codes(opinion, process, (1, 8), SampleSpec(index), SamplingConfig(steps=1, temperature=1, final="mode"))
    said = opinion(torch.zeros(1, 1, 8), torch.zeros(1), None).flatten()
    assert (value_of(z, 8) == (VALUES @ said[:8] + said[8:]).argmax()).all()


def groupwise(z: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None = None) -> Tensor:
    """A denoiser of groups of 8 bits that judges each token alone, so that a batch cannot change its arithmetic."""
    shift = 0.0 if labels is None else labels[:, None, None] * 0.5
    mark = 0.0 if known is None else known[..., None] * 0.3
    l_BNC = (1 - 2 * z) * (0.7 + time[:, None, None]) + shift + mark
    return torch.cat([l_BNC, torch.sin(torch.arange(256) + 3 * z[..., :1]) + mark], -1)


METHODS = [
    SamplingConfig(steps=8, guidance=1.5),
    SamplingConfig(steps=8, inpainting="conditioned"),
    SamplingConfig(steps=8, inpainting="replacement", resample=2),
]


@pytest.mark.parametrize("config", METHODS)
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(config: SamplingConfig) -> None:
    process, labels = DiffusionProcess(make_schedule("cosine", 16), group=8), torch.arange(24) % 4 - 1
    known = Known(some_code("known", 24, (4, 8)).float(), uniform(0, "mask", torch.arange(24), 4) < 0.4)

    def draw(part: slice, seed: int = 9) -> Tensor:
        given = None if config.guidance else Known(known.z[part], known.mask[part])
        samples = SampleSpec(torch.arange(24)[part], labels[part], seed)
        return sample_codes(groupwise, process, (4, 8), samples, config, given)

    whole = draw(slice(None))
    for size in (1, 7):
        assert torch.equal(torch.cat([draw(slice(start, start + size)) for start in range(0, 24, size)]), whole)
    assert not torch.equal(draw(slice(None), 8), whole)
    if not config.guidance:
        assert torch.equal(whole[known.mask], known.z[known.mask])
        nothing = Known(known.z, torch.zeros_like(known.mask))
        samples = SampleSpec(torch.arange(24), labels, 9)
        plain = sample_codes(groupwise, process, (4, 8), samples, config)
        assert torch.equal(sample_codes(groupwise, process, (4, 8), samples, config, nothing), plain)


@pytest.mark.parametrize("method", ["conditioned", "replacement"])
def test_known_tokens_steer_the_others_jointly(method: Literal["conditioned", "replacement"]) -> None:
    # Conditioned, one step draws a token from its true conditional; replacement is biased, though it goes there.
    toy, count = group_toy(4, 2, 8), 20_000
    known = Known(torch.tensor([1.0, 0.0]).expand(count, 2, 2), torch.tensor([True, False]).expand(count, 2))
    given = toy.p * (toy.states[:, 0] == torch.tensor([1.0, 0.0])).all(-1)
    conditional = GroupToy(given / given.sum(), (2, 2), toy.process)

    def denoiser(z: Tensor, time: Tensor, labels: Tensor | None, marks: Tensor | None = None) -> Tensor:
        return toy(z, time, labels) if marks is None else conditional(z, time, labels)

    steps = 1 if method == "conditioned" else 8
    config = SamplingConfig(steps=steps, temperature=1.0, inpainting=method, resample=4)
    z = sample_codes(denoiser, toy.process, (2, 2), SampleSpec(torch.arange(count)), config, known)
    assert torch.equal(z[:, 0], known.z[:, 0])
    if method == "conditioned":
        assert_drawn_from(toy.number(z), conditional.p)
    else:
        drawn = torch.bincount(toy.number(z), minlength=16).double() / count
        free = toy.p * 0 + (toy.p.view(4, 4).sum(0) * torch.eye(4, dtype=torch.float64)[2][:, None]).flatten()
        assert total_variation(drawn, conditional.p) < total_variation(free, conditional.p)


def test_a_token_has_an_output_for_each_bit_and_for_each_value_of_a_group() -> None:
    assert [output_size(bits, group) for bits, group in ((32, 1), (32, 8), (8, 8), (4, 2))] == [32, 1056, 264, 12]
