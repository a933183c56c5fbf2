"""The equations of the process: forward, calibration, reverse step, losses (bld_core/README.md, sections 2 to 5)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.diffusion.bound import likelihood_bound
from bld_core.diffusion.loss import (
    Step,
    balanced_residual_loss,
    diffusion_loss,
    loss_terms,
    residual_loss,
    vlb_loss,
)
from bld_core.diffusion.process import (
    Calibration,
    CodeBatch,
    DiffusionConfig,
    DiffusionProcess,
    Target,
    calibrate,
    corrupt,
    reverse_flip_coefficients,
    reverse_flip_probability,
    transition,
)
from bld_core.diffusion.schedule import NoiseSchedule, ScheduleName, make_schedule, schedule_from_betas
from bld_core.noise import uniform
from tests.bld_core.toys import (
    SCHEDULES,
    STATES,
    TARGETS,
    Oracle,
    TokenOracle,
    iid_oracle,
    oracle_evidence,
    oracle_output,
    toy_codes,
    toy_distribution,
    toy_process,
)

BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)
NAMED = [make_schedule(name, 64) for name in SCHEDULES]
every_schedule = pytest.mark.parametrize("schedule", NAMED, ids=SCHEDULES)


def single_step(z_s: Tensor, k_s: float, k_t: float) -> Tensor:
    """q(z_t = row | z_s) as the paper's Eq. 4 has it: keep, or with probability beta draw a fair coin."""
    beta = 1 - k_t / k_s
    one = (1 - beta) * z_s + 0.5 * beta
    return torch.stack([1 - one, one])


# --- The forward process --------------------------------------------------------------------------------------------


@every_schedule
def test_transitions_compose(schedule: NoiseSchedule) -> None:
    k = schedule.k.tolist()
    for r in range(0, 62, 7):
        for s in range(r + 1, 63, 5):
            for t in range(s + 1, 65, 3):
                two_steps = transition(transition(BITS, k[r], k[s]), k[s], k[t])
                torch.testing.assert_close(two_steps, transition(BITS, k[r], k[t]), rtol=0, atol=1e-12)


@every_schedule
def test_a_single_step_is_equation_4_and_the_marginal_equation_5(schedule: NoiseSchedule) -> None:
    k = schedule.k.tolist()
    marginal = BITS
    for t in range(1, 65):
        torch.testing.assert_close(
            transition(BITS, k[t - 1], k[t]), single_step(BITS, k[t - 1], k[t])[1], rtol=0, atol=1e-15
        )
        marginal = single_step(marginal, k[t - 1], k[t])[1]  # Eq. 4, t times
        torch.testing.assert_close(transition(BITS, 1.0, k[t]), marginal, rtol=0, atol=1e-12)
    assert (transition(BITS, 1.0, k[64]) == 0.5).all()


def test_corruption_flips_with_probability_half_of_1_minus_k() -> None:
    z_0 = (uniform(0, "z", torch.arange(500), 400) < 0.3).float()
    u = uniform(0, "u", torch.arange(500), 400)
    for k_t in (0.9, 0.5, 0.0):
        z_t, flip = corrupt(z_0, k_t, u)
        assert set(z_t.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(flip.bool(), z_t != z_0)
        p = (1 - k_t) / 2
        assert abs(float(flip.mean()) - p) < 4 * math.sqrt(p * (1 - p) / z_0.numel())


# --- The reverse step -----------------------------------------------------------------------------------------------


def bayes(p: float, k_s: float, k_t: float) -> Tensor:
    """P(z_s, z_0 | z_t) of a bit with P(z_0 = 1) = p, by enumeration: (z_t, z_s, z_0)."""
    prior = torch.tensor([1 - p, p], dtype=torch.float64)
    to_s = single_step(BITS, 1.0, k_s)  # (z_s, z_0)
    to_t = single_step(BITS, k_s, k_t)  # (z_t, z_s)
    joint = to_t[:, :, None] * to_s[None] * prior
    return joint / joint.sum((1, 2), keepdim=True)


@every_schedule
@pytest.mark.parametrize("p", [0.03, 0.5, 0.8])
def test_the_reverse_step_is_bayes_rule_for_every_pair_of_levels(schedule: NoiseSchedule, p: float) -> None:
    k = schedule.k.tolist()
    for t in range(1, 65):
        for s in range(0, t, 5):
            truth = bayes(p, k[s], k[t])
            a, b = reverse_flip_coefficients(k[s], k[t])
            for z_t in (0, 1):
                given_z_0 = truth[z_t] / truth[z_t].sum(0)  # (z_s, z_0)
                assert given_z_0[1 - z_t, 1 - z_t] == pytest.approx(a, abs=1e-12)  # flipped; changed back after s
                assert given_z_0[1 - z_t, z_t] == pytest.approx(b, abs=1e-12)
                r = truth[z_t, :, 1 - z_t].sum()
                change = reverse_flip_probability(r, k[s], k[t])
                stay = reverse_flip_probability(1 - r, k[s], k[t])
                assert float(change) == pytest.approx(float(truth[z_t, 1 - z_t].sum()), abs=1e-12)
                assert 0 <= float(change) <= 1
                assert float(change + stay) == pytest.approx(float(a) + float(b), abs=1e-12)


@every_schedule
def test_the_rows_of_the_reverse_chain_sum_to_one(schedule: NoiseSchedule) -> None:
    # One matrix P(z_s | z_t) for each step; a chain of rows that sum to one carries the true marginals back to z_0.
    p, k = 0.8, schedule.k.tolist()
    now = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for t in range(64, 0, -1):
        truth = bayes(p, k[t - 1], k[t])
        change = reverse_flip_probability(torch.stack([truth[0, :, 1].sum(), truth[1, :, 0].sum()]), k[t - 1], k[t])
        now = torch.stack(
            [now[0] * (1 - change[0]) + now[1] * change[1], now[0] * change[0] + now[1] * (1 - change[1])]
        )
        assert float(now.sum()) == pytest.approx(1, abs=1e-12)
        assert float(now[1]) == pytest.approx(float(transition(torch.tensor(p), 1.0, k[t - 1])), abs=1e-6)
    assert float(now[1]) == pytest.approx(p, abs=1e-12)


@every_schedule
def test_at_s_0_the_step_flips_with_r_and_from_the_end_it_forgets_z_t(schedule: NoiseSchedule) -> None:
    k = schedule.k.tolist()
    r = torch.linspace(0, 1, 11, dtype=torch.float64)
    for t in range(1, 65):
        torch.testing.assert_close(reverse_flip_probability(r, k[0], k[t]), r, rtol=0, atol=1e-12)
    for s in range(64):  # P(z_s = z_0) = (1 + k_s) / 2 whether or not z_T = z_0
        assert reverse_flip_coefficients(k[s], k[64]) == pytest.approx(((1 + k[s]) / 2, (1 - k[s]) / 2), abs=1e-12)


# --- What the network says ------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("p", [0.01, 0.5, 0.7])
def test_calibration_turns_evidence_logits_into_the_posterior_logits(schedule: NoiseSchedule, p: float) -> None:
    k = schedule.k.tolist()
    for t in range(1, 65):
        truth = bayes(p, 1.0, k[t])  # s = 0
        for z_t in (0, 1):
            r = truth[z_t, :, 1 - z_t].sum()
            evidence = torch.tensor((1 - 2 * z_t) * math.log(p / (1 - p)), dtype=torch.float64)
            assert float(calibrate(evidence, k[t])) == pytest.approx(float(torch.logit(r)), abs=1e-9)


def test_calibration_without_signal_is_the_identity_and_without_noise_certain() -> None:
    evidence = torch.linspace(-3, 3, 7)
    assert torch.equal(calibrate(evidence, 0.0), evidence)
    assert (torch.sigmoid(calibrate(evidence, 1.0)) == 0).all()


# --- The losses -----------------------------------------------------------------------------------------------------


def brute_force_kl(evidence: Tensor, flip: Tensor, k_s: float, k_t: float) -> Tensor:
    """KL of the two Bernoullis, term by term, from the posterior by enumeration."""
    r = (
        torch.sigmoid(evidence)
        * (1 - k_t)
        / (torch.sigmoid(evidence) * (1 - k_t) + torch.sigmoid(-evidence) * (1 + k_t))
    )
    truth = bayes(0.5, k_s, k_t)
    truth = truth / truth.sum(1, keepdim=True)  # P(z_s | z_t, z_0)
    q = torch.where(flip.bool(), truth[0, 1, 1], truth[0, 1, 0])
    p = r * truth[0, 1, 1] + (1 - r) * truth[0, 1, 0]
    return torch.xlogy(q, q / p) + torch.xlogy(1 - q, (1 - q) / (1 - p))


@every_schedule
def test_vlb_is_the_kl_by_brute_force(schedule: NoiseSchedule) -> None:
    k = schedule.k.tolist()
    evidence = torch.linspace(-6, 6, 25, dtype=torch.float64).repeat(2, 1)
    flip = BITS[:, None].expand_as(evidence)
    pairs = [(s, t) for t in range(1, 65) for s in {t - 1, t // 2, 0}]
    truth = torch.stack([brute_force_kl(evidence, flip, k[s], k[t]) for s, t in pairs])
    vlb = torch.stack([vlb_loss(evidence, flip, k[s], k[t]) for s, t in pairs])
    torch.testing.assert_close(vlb, truth, rtol=1e-7, atol=1e-11)


@every_schedule
def test_the_last_vlb_is_the_bce(schedule: NoiseSchedule) -> None:
    evidence = torch.linspace(-9, 9, 19, dtype=torch.float64).repeat(2, 1)
    flip = BITS[:, None].expand_as(evidence)
    k_1 = float(schedule.k[1])
    bce = F.binary_cross_entropy_with_logits(calibrate(evidence, k_1), flip, reduction="none")
    torch.testing.assert_close(vlb_loss(evidence, flip, 1.0, k_1), bce, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(residual_loss(evidence, flip, k_1), bce, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [4, 64, 1024])
def test_losses_and_gradients_stay_finite_for_extreme_evidence_in_float32(name: str, steps: int) -> None:
    schedule = make_schedule(name, steps)
    k_t, k_s = schedule.k[1:, None, None], schedule.k[:-1, None, None]
    evidence = torch.tensor([-50.0, -10.0, 0.0, 10.0, 50.0]).expand(steps, 2, 5).contiguous().requires_grad_()
    flip = torch.tensor([0.0, 1.0])[None, :, None].expand(steps, 2, 5)
    for loss in (vlb_loss(evidence, flip, k_s, k_t), residual_loss(evidence, flip, k_t)):
        assert loss.isfinite().all()
        assert (loss > -1e-5).all()
        (gradient,) = torch.autograd.grad(loss.sum(), evidence)
        assert gradient.isfinite().all()
        assert (gradient[:, 0] > -1e-5).all()  # a clean bit never asks for more evidence of a flip,
        assert (gradient[:, 1] < 1e-5).all()  # a flipped one never for less


# --- Calibration: what a network learns from an i.i.d. source ---------------------------------------------------------

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def expected_loss(evidence: Tensor, p: float, schedule: NoiseSchedule, loss: Loss) -> Tensor:
    """The exact mean over z_0 and its corruption of an elementwise loss of e(t, z_t); (T, 2) -> (T,)."""
    k_t = schedule.k[1:, None]
    total = torch.zeros(len(k_t), dtype=torch.float64)
    for z_0, weight in ((0, 1 - p), (1, p)):
        one = transition(torch.tensor(float(z_0), dtype=torch.float64), 1.0, k_t)
        q = torch.cat([1 - one, one], dim=1)  # (T, z_t)
        flip = (BITS - z_0).abs().expand_as(evidence)
        total = total + weight * (q * loss(evidence, flip, k_t)).sum(1)
    return total


def best_table(p: float, schedule: NoiseSchedule, loss: Loss) -> Tensor:
    """The free table e(t, z_t) that minimises the expected loss, by bisection on the slope of each entry."""
    low, high = torch.full((2, schedule.steps, 2), 8.0, dtype=torch.float64) * torch.tensor([-1.0, 1.0])[:, None, None]
    for _ in range(24):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(expected_loss(middle, p, schedule, loss).sum(), middle)
        middle = middle.detach()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return (low + high) / 2


@every_schedule
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_plain_balanced_and_vlb_losses_all_teach_the_log_odds_at_every_t(schedule: NoiseSchedule, p: float) -> None:
    truth = ((1 - 2 * BITS) * math.log(p / (1 - p))).expand(schedule.steps, 2)
    k_s = schedule.k[:-1, None]
    losses: list[Loss] = [residual_loss, balanced_residual_loss, lambda e, f, k_t: vlb_loss(e, f, k_s, k_t)]
    for loss in losses:
        torch.testing.assert_close(best_table(p, schedule, loss), truth, rtol=0, atol=1e-3)


class Elementwise(nn.Module):
    """A network that judges each bit from its value and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return self.body(torch.stack([2 * z - 1, time[:, None, None].expand_as(z)], -1)).squeeze(-1)


def trained_on_iid(p: float, config: DiffusionConfig) -> Elementwise:
    process = config.make_process()
    torch.manual_seed(0)
    network = Elementwise()
    steps, rows = 250, 256
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = torch.arange(rows) + step * rows
        z_0 = (uniform(0, "source", index, 32) < p).float().view(-1, 4, 8)
        optimizer.zero_grad()
        diffusion_loss(network, process, CodeBatch(z_0, None, index), config, seed=0)["loss"].backward()
        optimizer.step()
        decay.step()
    return network


def evidence_at_every_t(network: Elementwise, process: DiffusionProcess, z_t: float) -> Tensor:
    z, time = torch.full((64, 1, 1), z_t), torch.arange(1, 65) / 64
    output = network(z, time, None).detach()
    return process.evidence(output, z, process.schedule.k[1:, None, None]).bits.flatten()


@pytest.mark.parametrize(
    ("target", "balance"), [("flip", "none"), ("flip", "flip"), ("z0", "none"), ("z0", "flip"), ("z_prev", "none")]
)
def test_a_network_trained_on_an_iid_source_is_calibrated_at_every_t(
    target: Target, balance: Literal["none", "flip"]
) -> None:
    p = 0.7
    config = DiffusionConfig(target=target, balance=balance)
    network = trained_on_iid(p, config)
    for z_t in (0.0, 1.0):
        truth = torch.full((64,), (1 - 2 * z_t) * math.log(p / (1 - p)))
        evidence = evidence_at_every_t(network, config.make_process(), z_t)
        torch.testing.assert_close(evidence, truth, rtol=0, atol=0.05)


@pytest.mark.parametrize("target", TARGETS)
def test_without_calibration_a_network_learns_how_r_depends_on_t_roughly(target: Target) -> None:
    p = 0.7
    config = DiffusionConfig(target=target, calibration="none")
    network, process = trained_on_iid(p, config), config.make_process()
    codes = CodeBatch.numbered((uniform(0, "held out", torch.arange(2000), 64) < p).to(torch.uint8).view(-1, 8, 8))
    learned = likelihood_bound(network, process, codes).bits_per_bit
    truth = likelihood_bound(iid_oracle(p), DiffusionProcess(process.schedule, "flip"), codes).bits_per_bit
    assert truth < learned < truth + 0.1 < 1  # on the same noise


# --- Prediction targets (Table 7) -------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("calibration", ["bayes", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_output_of_every_targets_oracle_is_the_same_evidence(
    schedule: NoiseSchedule, target: Target, calibration: Calibration
) -> None:
    p, process = toy_distribution(1), DiffusionProcess(schedule, target, calibration)
    for k_t in schedule.k[1:].tolist():
        evidence = process.evidence(oracle_output(p, k_t, process), STATES, k_t)
        assert evidence.residual is None
        torch.testing.assert_close(evidence.bits, oracle_evidence(p, k_t), rtol=0, atol=1e-8)


@every_schedule
def test_without_calibration_the_sigmoid_of_the_output_is_the_posterior(schedule: NoiseSchedule) -> None:
    # r itself, or the probability of a 1, as it stands.
    output = torch.linspace(-4, 4, 24, dtype=torch.float64).view(8, 3)
    for k_t in schedule.k[1:].tolist():
        for target in TARGETS:
            evidence = DiffusionProcess(schedule, target, "none").evidence(output, STATES, k_t)
            r = torch.sigmoid(calibrate(evidence.bits, k_t))
            said = r if target == "flip" else torch.where(STATES == 1, 1 - r, r)
            torch.testing.assert_close(said, torch.sigmoid(output), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "known_tokens"), [(4, False), (64, False), (1024, False), (16, True)])
def test_the_targets_oracles_have_the_same_terms(name: ScheduleName, steps: int, known_tokens: bool) -> None:
    p, index = toy_distribution(2), torch.arange(2000)
    z_0, known = toy_codes(p, len(index)), None
    if known_tokens:
        z_0, known = z_0.transpose(1, 2), torch.eye(3, dtype=torch.bool)[index % 3]
    losses: dict[tuple[Target, Calibration], dict[str, Tensor]] = {}
    for target, calibration in itertools.product(TARGETS, get_args(Calibration)):
        config = DiffusionConfig(steps=steps, schedule=name, target=target, calibration=calibration)
        process, codes = config.make_process(), CodeBatch(z_0, None, index)
        oracle = TokenOracle(p, process) if known_tokens else Oracle(p, process)
        losses[target, calibration] = diffusion_loss(oracle, process, codes, config, 1, known)
        if known_tokens:  # what is known changes what is lost
            whole = diffusion_loss(oracle, process, codes, config, 1)
            assert not torch.equal(losses[target, calibration]["vlb"], whole["vlb"])
    for (target, _), found in losses.items():
        for term in ("residual", "vlb"):
            torch.testing.assert_close(found[term], losses["flip", "bayes"][term], rtol=2e-5, atol=0)
        loss = found["vlb"] * steps if target == "z_prev" else found["residual"] + 0.1 * found["vlb"]
        torch.testing.assert_close(found["loss"], loss)


def test_the_loss_of_z_prev_is_an_estimate_of_the_bound_and_does_not_read_lambda() -> None:
    p, process = toy_distribution(2), toy_process("linear", 16, "z_prev")
    codes = CodeBatch.numbered(toy_codes(p, 20_000))
    config = DiffusionConfig(steps=16, target="z_prev", vlb_weight=0.0)
    nats = diffusion_loss(Oracle(p, process), process, codes, config, seed=0)["loss"]
    bound = likelihood_bound(Oracle(p, process), process, codes)
    assert abs(float(nats) / math.log(2) - bound.bits_per_bit) < 0.02


def test_z_prev_has_no_residual_term_to_balance() -> None:
    with pytest.raises(ValueError, match=r"`balance` is flip with .*z_prev.*no residual.*none"):
        DiffusionConfig(target="z_prev", balance="flip")


# --- Schedules by configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_all_four_schedules_are_configured_and_come_back_from_json(target: Target) -> None:
    betas = [1 / (16 - t) for t in range(16)]
    configs = [DiffusionConfig(steps=16, schedule=name, target=target) for name in ("linear", "cosine", "sigmoid")]
    configs.append(DiffusionConfig(steps=16, schedule="betas", betas=betas, target=target))
    for config in configs:
        again = DiffusionConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config
        assert torch.equal(again.make_process().schedule.k, config.make_process().schedule.k)
    linear, given = (configs[i].make_process().schedule.k for i in (0, 3))
    assert torch.equal(given, schedule_from_betas(betas).k)
    torch.testing.assert_close(given, linear, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "betas", "betas": [0.1] * 16}, r"ends at 0\.1853.*0\.001"),
        ({"schedule": "betas", "betas": [0.5] * 15}, r"`betas` are 15.*`steps` \(16\)"),
        ({"schedule": "betas", "betas": [0.9] * 15 + [0.0]}, r"beta lies in"),
        ({"betas": [0.5] * 16}, r"`schedule` is linear.*does not read"),
    ],
)
def test_betas_that_are_no_schedule_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(steps=16, **settings)


# --- The training loss ------------------------------------------------------------------------------------------------


def test_diffusion_loss_is_residual_plus_lambda_vlb_and_keyed_on_the_index() -> None:
    config = DiffusionConfig(target="flip", vlb_weight=0.3)
    process = config.make_process()
    index = torch.arange(40, 60)
    z_0 = (uniform(1, "z", index, 32) < 0.4).float().view(-1, 4, 8)
    whole = diffusion_loss(iid_oracle(0.4), process, CodeBatch(z_0, None, index), config, seed=3)
    torch.testing.assert_close(whole["loss"], whole["residual"] + 0.3 * whole["vlb"])
    halves = [
        diffusion_loss(iid_oracle(0.4), process, CodeBatch(z_0[i], None, index[i]), config, seed=3)
        for i in (slice(0, 10), slice(10, 20))
    ]
    torch.testing.assert_close(whole["loss"], (halves[0]["loss"] + halves[1]["loss"]) / 2)


def test_loss_terms_are_a_mean_over_bits_of_the_elementwise_losses() -> None:
    schedule = make_schedule("cosine", 16)
    z_0 = (uniform(1, "z", torch.arange(16), 24) < 0.4).float().view(-1, 3, 8)
    u = uniform(1, "u", torch.arange(16), 24).view_as(z_0)
    t = torch.arange(1, 17)
    step = Step(t, t - 1, u)
    residual, vlb = loss_terms(iid_oracle(0.4), DiffusionProcess(schedule, "flip"), CodeBatch.numbered(z_0), step)
    for i in range(16):
        k_s, k_t = float(schedule.k[i]), float(schedule.k[i + 1])
        z_t, flip = corrupt(z_0[i], k_t, u[i])
        evidence = iid_oracle(0.4)(z_t, t[i] / 16, None)
        assert float(residual[i]) == pytest.approx(float(residual_loss(evidence, flip, k_t).mean()), rel=1e-5)
        assert float(vlb[i]) == pytest.approx(float(vlb_loss(evidence, flip, k_s, k_t).mean()), rel=1e-4, abs=1e-7)


@every_schedule
@pytest.mark.parametrize("p", [0.5, 0.8, 0.99])
def test_the_bound_of_an_iid_source_is_its_entropy(schedule: NoiseSchedule, p: float) -> None:
    # A single bit's reverse step is exact, so the sum over t of E[L_vlb] is no bound but the entropy itself.
    evidence = ((1 - 2 * BITS) * math.log(p / (1 - p))).expand(schedule.steps, 2)
    k_s = schedule.k[:-1, None]
    nats = expected_loss(evidence, p, schedule, lambda e, f, k_t: vlb_loss(e, f, k_s, k_t)).sum()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert float(nats) / math.log(2) == pytest.approx(entropy, abs=1e-9)


def test_diffusion_config_names_its_bounds() -> None:
    with pytest.raises(ValueError, match=r"`steps` is 3.*4\.\.1024"):
        DiffusionConfig(steps=3)
    with pytest.raises(ValueError, match=r"`vlb_weight` is -0\.1.*0 or more"):
        DiffusionConfig(vlb_weight=-0.1)
