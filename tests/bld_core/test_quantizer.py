from __future__ import annotations

import math

import torch

from bld_core.noise import uniform
from bld_core.quantizer import quantize


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
