"""Compiled blocks: whole graphs, each made once, and the losses of plain training.

By PyTorch's tracer and its autograd, without its code generator, which takes minutes; the long gear has one step of it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.diffusion.process import DiffusionConfig
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Batch, Objective, TrainingConfig, TrainState, make_state, train
from tests.bld_core.test_precision import trained_pair
from tests.bld_core.toys import TINY_AUTOENCODER

STEPS = 20
TRAINING = TrainingConfig(steps=STEPS, batch_size=4, learning_rate=1e-3, warmup=0)
LOSS = LossConfig(adversarial=1.0, adversarial_start=3, critic_layers=1, critic_channels=4, entropy=0.1)
PRIOR = PriorConfig(layers=3, width=16, heads=2, classes=3, known_share=0.5)


def stage_1(config: TrainingConfig) -> tuple[TrainState, Objective, tuple[int, ...], int]:
    state = make_state(make_autoencoder(TINY_AUTOENCODER, 1, 0.1), config)
    state.critic = make_state(PatchCritic(LOSS, 1), config)
    return state, AutoencoderObjective(LOSS, TINY_AUTOENCODER.code_shape(16), 0), (4, 16, 16, 1), 256


def stage_2(config: TrainingConfig) -> tuple[TrainState, Objective, tuple[int, ...], int]:
    model = make_model(PRIOR, DiffusionConfig(steps=16), 4, 8)
    return make_state(model.network(), config), model.objective(0), (4, 4, 8), 2


def losses(make: Callable[..., tuple[TrainState, Objective, tuple[int, ...], int]], config: TrainingConfig) -> Tensor:
    """The losses of some steps on noise."""
    torch.manual_seed(0)
    state, objective, shape, values = make(config)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Batch]:
        for step in itertools.count():
            data = torch.randint(0, values, shape, generator=generator).byte()
            yield Batch(data, torch.arange(4) % 3, step * 4 + torch.arange(4), [""] * 4)

    return torch.stack([report.terms["loss"] for report in train(state, batches(), objective, config)])


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "checkpointing"),
    [pytest.param(stage_1, False, marks=pytest.mark.long), (stage_1, True), (stage_2, False), (stage_2, True)],
)
def test_every_block_is_one_graph_made_once_and_losses_are_those_of_plain_training(
    make: Callable[..., tuple[TrainState, Objective, tuple[int, ...], int]], checkpointing: bool, traced: None
) -> None:
    config = replace(TRAINING, compile=True, checkpointing=checkpointing)
    first = losses(make, replace(config, steps=5))
    made = counters["stats"]["unique_graphs"]
    compiled = losses(make, config)
    assert torch.equal(compiled[:5], first)
    assert 0 < made == counters["stats"]["unique_graphs"], "nothing is compiled again"
    assert not counters["graph_break"], dict(counters["graph_break"])
    plain = losses(make, TRAINING)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_blocks_that_are_alike_are_compiled_once(traced: None) -> None:
    losses(stage_2, replace(TRAINING, steps=1, compile=True))
    assert counters["stats"]["unique_graphs"] == 1, "of three blocks"


def test_a_smaller_last_batch_of_samples_is_filled_up_and_compiles_nothing_anew(traced: None) -> None:
    generator = trained_pair()
    plain = generator.sample(labels=[0, 1, 2, 0, 1], batch_size=3)
    generator.sample(labels=[0, 1, 2], batch_size=3, compile=True)
    made = counters["stats"]["unique_graphs"]
    drawn = generator.sample(labels=[0, 1, 2, 0, 1], batch_size=3, compile=True)
    assert 0 < made == counters["stats"]["unique_graphs"]
    assert torch.equal(drawn, plain)


def test_a_graph_break_that_is_planted_is_found(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from bld_core.prior.blocks import Block

    forward = Block.forward

    def broken(self: Block, h: Tensor, condition: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(self, h, condition)

    monkeypatch.setattr(Block, "forward", broken)
    losses(stage_2, replace(TRAINING, steps=1, compile=True))
    assert counters["graph_break"]
