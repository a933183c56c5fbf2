from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bld_core.autoencoder.quantizer import BernoulliBottleneck, entropy_term, quantize
from bld_core.metrics.code_health import CodeHealth
from bld_core.noise import uniform


def test_values_are_exactly_0_or_1_for_any_logits() -> None:
    logits = torch.cat([torch.linspace(-200, 200, 9999), torch.tensor([-math.inf, math.inf])]).requires_grad_()
    u = uniform(0, "draw", torch.arange(1), len(logits))[0]
    for z in (quantize(logits), quantize(logits, u)):
        assert set(z.unique().tolist()) == {0.0, 1.0}
        assert z[-2:].tolist() == [0.0, 1.0]


def test_the_gradient_is_that_of_the_sigmoid_whatever_is_drawn() -> None:
    logits = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.autograd.grad((torch.sigmoid(logits) * weight).sum(), logits)[0]
    u = uniform(0, "draw", torch.arange(1), 1001)[0].double()
    for z in (quantize(logits), quantize(logits, u)):
        torch.testing.assert_close(torch.autograd.grad((z * weight).sum(), logits)[0], truth, rtol=0, atol=0)
    y = torch.sigmoid(logits.detach())
    torch.testing.assert_close(truth, weight * y * (1 - y), rtol=1e-12, atol=1e-15)


def test_the_mode_is_1_where_the_logit_is_positive() -> None:
    assert quantize(torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0])).tolist() == [0, 0, 0, 1, 1]


def test_draws_are_1_as_often_as_the_probability_says() -> None:
    n = 100_000
    for logit in (-3.0, -0.5, 0.0, 2.0):
        y = 1 / (1 + math.exp(-logit))
        z = quantize(torch.full((n,), logit), uniform(1, f"draw {logit}", torch.arange(n), 1)[:, 0])
        assert abs(float(z.mean()) - y) < 4 * math.sqrt(y * (1 - y) / n)


def test_eq_1_through_a_decoder() -> None:
    """The gradient of any decoder's loss with respect to the logits: (dL/dz) y (1 - y), dL/dz by finite differences."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    u = torch.rand(2, 4, 2, 2, generator=generator, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return (z.flatten(1) @ mix).tanh().square().sum()

    z = quantize(logits, u)
    gradient = torch.autograd.grad(loss(z), logits)[0]
    for place in range(logits.numel()):
        nudge = torch.zeros(32, dtype=torch.float64)
        nudge[place] = 1e-6
        nudge = nudge.view(logits.shape)
        slope = float(loss(z.detach() + nudge) - loss(z.detach() - nudge)) / 2e-6
        y = 1 / (1 + math.exp(-logits.flatten()[place].item()))
        assert float(gradient.flatten()[place]) == pytest.approx(slope * y * (1 - y), rel=1e-6, abs=1e-8)


def test_the_bernoulli_bottleneck_is_the_quantizer() -> None:
    logits = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    u = uniform(0, "draw", torch.arange(2), 72).view(logits.shape)
    bottleneck = BernoulliBottleneck(8)
    assert bottleneck.inputs == bottleneck.outputs == 8
    for draw in (u, None):
        z, terms = bottleneck(logits, draw)
        assert torch.equal(z, quantize(logits, draw))
        assert terms == {}
    with pytest.raises(ValueError, match=r"entropy .* is -1; a weight must be 0"):
        BernoulliBottleneck(8, entropy=-1)


# Logits of one bit over four positions, and what the term is, by hand.
SURE = 200.0
ENTROPY_TERMS = {
    "sure and balanced": ([SURE, -SURE, SURE, -SURE], -math.log(2)),
    "sure and stuck": ([SURE, SURE, SURE, SURE], 0.0),
    "undecided": ([0.0, 0.0, 0.0, 0.0], 0.0),
    "sure, 1 in 4": ([SURE, -SURE, -SURE, -SURE], 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
    "half undecided": ([0.0, 0.0, SURE, -SURE], 0.5 * math.log(2) - math.log(2)),
}


@pytest.mark.parametrize("name", ENTROPY_TERMS)
def test_the_entropy_term_by_hand(name: str) -> None:
    column, truth = ENTROPY_TERMS[name]
    logits = torch.tensor(column).view(2, 1, 1, 2).requires_grad_()
    _, terms = BernoulliBottleneck(1, entropy=3.0)(logits)
    assert terms["entropy"].item() == pytest.approx(3 * truth, abs=1e-4)
    terms["entropy"].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_entropy_term_is_the_mutual_information_of_bit_and_position() -> None:
    logits = torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    information = 0.0
    for channel in range(5):
        y = 1 / (1 + np.exp(-logits[:, channel].double().numpy().ravel()))
        joint = np.stack([y, 1 - y]) / y.size
        information += float((joint * np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))).sum()) / 5
    assert float(entropy_term(logits)) == pytest.approx(-information, rel=1e-5)


def test_descending_the_entropy_term_makes_bits_sure_and_balanced() -> None:
    logits = (1 + 0.5 * torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert float((logits > 0).float().mean()) > 0.95
    optimizer = torch.optim.SGD([logits], lr=100)
    for _ in range(300):
        optimizer.zero_grad()
        entropy_term(logits).backward()
        optimizer.step()
    y = logits.detach().sigmoid()
    assert float((y - 0.5).abs().min()) > 0.49
    assert float((y > 0.5).float().mean()) < 0.75


def health_of(*parts: Tensor) -> CodeHealth:
    health = CodeHealth()
    for part in parts:
        health.update(part)
    return health


def mixed_logits() -> Tensor:
    """Ten bits: eight that share a common cause, one always 1, one always 0 but for a single position."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 10, 4, 4, generator=generator) + torch.randn(12, 1, 4, 4, generator=generator)
    logits[:, 8], logits[:, 9] = 3.0, -2.0
    logits[0, 9, 0, 0] = 1.0
    return logits


def test_code_health_by_brute_force() -> None:
    logits = mixed_logits()
    health = health_of(logits)
    flat = logits.double().permute(0, 2, 3, 1).reshape(-1, 10).numpy()
    y, z = 1 / (1 + np.exp(-flat)), (flat > 0).astype(float)
    np.testing.assert_allclose(health.usage.numpy(), z.mean(0), rtol=0, atol=0)
    correlations = [
        abs(np.corrcoef(z[:, i], z[:, j])[0, 1]) for i in range(10) for j in range(10) if i != j and 8 not in (i, j)
    ]
    figures = health.metrics()
    assert figures["bit_entropy"] == pytest.approx(float(-(y * np.log2(y) + (1 - y) * np.log2(1 - y)).mean()), abs=1e-7)
    assert figures["bit_usage_mean"] == pytest.approx(float(z.mean()), abs=1e-15)
    assert figures["dead_bits"] == 0.2
    assert figures["bit_correlation"] == pytest.approx(float(np.mean(correlations)), abs=1e-12)


def test_code_health_is_the_same_however_the_work_is_split() -> None:
    logits = mixed_logits()
    whole = health_of(logits).metrics()
    assert health_of(*logits.split(1)).metrics() == whole
    assert health_of(*logits.flip(0).split(5)).metrics() == whole
    merged = CodeHealth()
    for worker in (logits[7:], logits[:3], logits[3:7]):
        merged.merge(health_of(worker))
    merged.merge(CodeHealth())
    assert merged.metrics() == whole


def test_code_health_of_known_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    coin = torch.randn(100, 2, 10, 10, generator=generator)
    independent = health_of(100 * coin).metrics()
    assert independent["bit_correlation"] < 4 / math.sqrt(10_000)
    assert independent["dead_bits"] == 0
    assert independent["bit_entropy"] < 0.05
    twins = health_of(torch.cat([coin[:, :1], 2 * coin[:, :1]], 1)).metrics()
    opposites = health_of(torch.cat([coin[:, :1], -coin[:, :1]], 1)).metrics()
    assert twins["bit_correlation"] == opposites["bit_correlation"] == 1
    assert opposites["bit_usage_mean"] == 0.5
    stuck = health_of(torch.tensor([300.0, -300.0]).view(1, 2, 1, 1).expand(4, 2, 3, 3)).metrics()
    assert stuck == {"bit_entropy": 0, "bit_usage_mean": 0.5, "dead_bits": 1, "bit_correlation": 0}
    undecided = health_of(torch.zeros(4, 2, 3, 3)).metrics()
    assert undecided["bit_entropy"] == 1
    assert all(math.isnan(figure) for figure in CodeHealth().metrics().values())


def test_training_can_take_the_mode_in_place_of_a_draw() -> None:
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    u = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    drawn, mode = (BernoulliBottleneck(4, draw=draw)(logits, u)[0] for draw in (True, False))
    assert torch.equal(mode, (logits > 0).float())
    assert not torch.equal(drawn, mode)
    assert torch.equal(drawn, quantize(logits, u))
