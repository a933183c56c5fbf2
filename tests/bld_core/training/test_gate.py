"""Steps that are decided on the device: taken as always, or without a trace."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from bld_core.training.gate import Later, step_unless
from bld_core.training.loop import TrainingConfig, TrainState, make_state
from tests.bld_core.toys import tiny_prior


def everything(state: TrainState) -> dict[str, Tensor]:
    found = {name: weight.detach().clone() for name, weight in state.module.named_parameters()}
    for number, weight in enumerate(state.module.parameters()):
        for optimizer in state.optimizers:
            moments = optimizer.state.get(weight, {})
            found |= {f"{number} {name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    return found


def take(state: TrainState, bad: float | None, spoil: bool = False) -> dict[str, Tensor]:
    """A step with random gradients, plain or gated; everything after it."""
    generator = torch.Generator().manual_seed(state.step)
    for weight in state.module.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
        if spoil:
            weight.grad.flatten()[0] = torch.nan
    for optimizer in state.optimizers:
        if bad is None:
            optimizer.step()
        else:
            step_unless(torch.tensor(bad), optimizer)
    state.step += 1
    return everything(state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_good_step_is_the_plain_one_and_a_bad_one_leaves_no_trace(optimizer: Literal["adamw", "muon"]) -> None:
    config = TrainingConfig(optimizer=optimizer, weight_decay=0.1, learning_rate=0.01)
    plain, gated = (make_state(tiny_prior(), config) for _ in range(2))
    for _ in range(2):
        truth, found = take(plain, None), take(gated, 0.0)
        assert truth.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
        after = take(gated, 1.0, spoil=True)
        assert all(torch.equal(after[name], tensor) for name, tensor in found.items())
        gated.step -= 1
    first = make_state(tiny_prior(), config)
    before = everything(first)
    after = take(first, 1.0, spoil=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_read_later_is_what_was_there() -> None:
    assert Later(torch.tensor(0.0)).read() == 0
    assert Later(torch.tensor(1.0)).read() == 1
