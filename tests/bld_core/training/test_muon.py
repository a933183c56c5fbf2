"""Muon: what orthogonalising does, and that a step is that of `torch.optim.Muon` but for its arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bld_core.training.muon import Muon, orthogonalized

SHAPES = [(48, 16), (16, 48), (16, 16), (48, 16)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (1, 32, 32)])
def test_orthogonalising_leaves_the_directions_and_makes_all_lengths_about_one(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    lengths = s / s.square().sum(1, keepdim=True).sqrt()
    for _ in range(5):
        lengths = 3.4445 * lengths - 4.7750 * lengths**3 + 2.0315 * lengths**5
    torch.testing.assert_close(orthogonalized(x), u @ torch.diag_embed(lengths) @ vt, rtol=0, atol=1e-10)
    large = s / s.square().sum(1, keepdim=True).sqrt() > 0.02
    assert ((lengths > 0.65) & (lengths < 1.25))[large].all()
    torch.testing.assert_close(orthogonalized(x.float()).double(), orthogonalized(x), rtol=0, atol=1e-4)


def test_a_step_is_that_of_torch_in_float32_and_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which torch orthogonalises
    ours, theirs = matrices(), matrices()
    rate, decay = 0.02, 0.1
    reference = torch.optim.Muon(theirs, lr=rate, weight_decay=decay, adjust_lr_fn="original")
    optimizer = Muon(ours, rate, decay)
    for step in range(4):
        if step == 2:
            optimizer = Muon(ours, rate, decay)
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for weights in (ours, theirs):
            for weight, gradient in zip(weights, gradients(step), strict=True):
                weight.grad = gradient
        before = [weight.detach().clone() for weight in theirs]
        optimizer.step()
        reference.step()
        for mine, other, old in zip(ours, theirs, before, strict=True):
            moved = (other - old).norm()
            assert (mine - other).norm() < 1e-4 * moved
            assert moved > 0.5 * rate * min(mine.shape) ** 0.5
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"], rtol=0, atol=1e-6
        )


def test_a_matrix_without_gradient_stays() -> None:
    [first, *rest] = matrices()
    before = [weight.detach().clone() for weight in (first, *rest)]
    optimizer = Muon([first, *rest], 0.02, 0.1)
    first.grad = gradients(0)[0]
    optimizer.step()
    assert not torch.equal(first, before[0])
    assert all(torch.equal(weight, old) for weight, old in zip(rest, before[1:], strict=True))
