"""Counted memory is what a real step takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.diffusion.process import DiffusionConfig
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.training.cost import Step, step_cost, step_memory
from bld_core.training.loop import Batch, Objective, TrainingConfig, TrainState, make_state, train

COUNT = 4
TRAINING = TrainingConfig(batch_size=COUNT)


def stage_1() -> Step:
    loss = LossConfig(adversarial=1.0, critic_layers=2, critic_channels=16)
    config = AutoencoderConfig(channels=32, multipliers=[1, 2], attention=[2], bits=8)

    def make() -> tuple[TrainState, Objective]:
        state = make_state(make_autoencoder(config, 3), TRAINING)
        state.critic = make_state(PatchCritic(loss, 3), TRAINING)
        return state, AutoencoderObjective(loss, config.code_shape(32), 0)

    return Step(make, lambda: torch.zeros(COUNT, 32, 32, 3, dtype=torch.uint8), TRAINING)


def stage_2() -> Step:
    model = make_model(PriorConfig(layers=3, width=64, heads=4), DiffusionConfig(steps=16), 64, 16)
    objective = model.objective(0)
    data = lambda: torch.zeros(COUNT, 64, 16).byte()  # noqa: E731
    return Step(lambda: (make_state(model.network(), TRAINING), objective), data, TRAINING)


def real_peak(made: Step) -> int:
    """The most bytes that the CPU's allocator had given out at a time, in two steps."""
    make, data, _ = made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        state, objective = make()
        batch = Batch(data(), torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT), [""] * COUNT)
        for _ in range(2):
            next(train(state, itertools.repeat(batch), objective, TRAINING))
    results: Any = seen.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("stage", [stage_1, stage_2])
def test_memory_is_that_of_a_real_step(stage: Callable[[], Step]) -> None:
    memory = step_memory(stage())
    assert min(memory) >= 0
    assert sum(memory) == pytest.approx(real_peak(stage()), rel=0.1)


def test_activations_grow_with_the_batch_and_operations_too() -> None:
    step = stage_2()
    one, two = (step_cost(step._replace(data=lambda n=n: torch.zeros(n, 64, 16).byte())) for n in (4, 8))
    assert two.operations == 2 * one.operations
    assert two.memory[:4] == one.memory[:4]
    assert two.memory.activations > 1.5 * one.memory.activations
