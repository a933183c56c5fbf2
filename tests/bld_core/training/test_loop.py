from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from bld_core.diffusion.process import DiffusionConfig
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import PriorConfig
from bld_core.training.averages import Ema
from bld_core.training.checkpoint import load_state, save_state
from bld_core.training.layers import Layers
from bld_core.training.loop import TrainingConfig, TrainState, learning_rate, make_state, train, worker_share
from tests.bld_core.toys import perturb, tiny_prior, toy_batches

ROWS = 22


def run(state: TrainState, config: TrainingConfig, steps: int) -> list[float]:
    """Take `steps` more steps on the toy data; the losses."""
    objective = PriorObjective(DiffusionConfig(steps=16), PriorConfig(), seed=0)
    reports = train(state, toy_batches(config, ROWS, state.step), objective, config)
    return [float(report.terms["loss"]) for report in itertools.islice(reports, steps)]


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor that training changes."""
    tensors = {f"model {name}": tensor for name, tensor in state.module.state_dict().items()}
    for average in state.averages:
        tensors |= {f"ema {average.decay} {name}": tensor for name, tensor in average.weights.items()}
    for i, parameter in enumerate(state.module.parameters()):
        for optimizer in state.optimizers:
            kept = optimizer.state.get(parameter, {})
            tensors |= {f"moment {i} {kind}": value for kind, value in kept.items()}
    return tensors


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_is_uninterrupted_bitwise(tmp_path: Path, optimizer: Literal["adamw", "muon"]) -> None:
    config = TrainingConfig(
        optimizer=optimizer,
        steps=10,
        batch_size=8,
        warmup=3,
        decay="cosine",
        weight_decay=0.01,
        learning_rate=1e-2,
        ema_decay=[0.2, 0.9, 0.1],
    )
    whole = make_state(tiny_prior(seed=0), config)
    losses = run(whole, config, 10)

    first = make_state(tiny_prior(seed=0), config)
    before = run(first, config, 5)
    save_state(str(tmp_path), first, {"position": [1, 2]})
    second = make_state(tiny_prior(seed=1), config)  # other weights
    assert load_state(str(tmp_path), second)["position"] == [1, 2]
    assert second.step == 5
    after = run(second, config, 5)

    assert before + after == losses
    truth, found = everything(whole), everything(second)
    assert truth.keys() == found.keys()
    for name, tensor in truth.items():
        assert torch.equal(tensor, found[name]), name
    assert not torch.equal(everything(first)["model head.weight"], truth["model head.weight"])


def test_training_learns_and_stops_at_its_last_step() -> None:
    config = TrainingConfig(steps=150, batch_size=16, warmup=5, learning_rate=1e-2)
    state = make_state(tiny_prior(), config)
    losses = run(state, config, 1000)
    assert len(losses) == 150 == state.step
    assert sum(losses[-30:]) / 30 < 0.95 * sum(losses[:10]) / 10


def test_every_report_has_the_step_the_rate_and_the_terms() -> None:
    config = TrainingConfig(steps=3, batch_size=8, warmup=2, learning_rate=1e-2, clip_norm=1e-3)
    objective = PriorObjective(DiffusionConfig(steps=16, vlb_weight=0.5), PriorConfig(), seed=0)
    state = make_state(tiny_prior(), config)
    for i, report in enumerate(train(state, toy_batches(config, ROWS), objective, config)):
        assert report.step == i + 1 == state.step
        assert report.learning_rate == learning_rate(config, i)
        assert float(report.gradient_norm) > 1e-3  # the norm before it is clipped
        terms = {name: float(value) for name, value in report.terms.items()}
        assert terms["loss"] == pytest.approx(terms["residual"] + 0.5 * terms["vlb"])
        assert not any(value.requires_grad for value in report.terms.values())
        clipped = torch.cat([p.grad.flatten() for p in state.module.parameters() if p.grad is not None]).norm()
        assert float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    config = TrainingConfig(steps=1, batch_size=8, warmup=0, optimizer="muon", learning_rate=1e-2)
    network, name = tiny_prior(seed=0), "blocks.0.attention.out.weight"
    perturb(network)  # a fresh one has no gradient but that of its head
    before = network.get_parameter(name).detach().double()
    state = make_state(network, config)
    muon, adamw = ({id(p) for group in each.param_groups for p in group["params"]} for each in state.optimizers)
    for each, weight in network.named_parameters():
        assert (id(weight) in muon) == (each.startswith("blocks.") and weight.ndim == 2), each
        assert (id(weight) in adamw) != (id(weight) in muon), each
    run(state, config, 1)
    moved = network.get_parameter(name).detach().double() - before
    values = torch.linalg.svdvals(moved) / (0.2 * math.sqrt(128) * 1e-2)  # most of what is added is nearly orthogonal
    assert float(values.median()) > 0.6
    assert float(values.max()) < 1.3


@torch.no_grad()
def test_a_step_of_muon_changes_what_a_matrix_gives_by_as_much_at_any_width() -> None:
    config = TrainingConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    changes: list[float] = []
    for width in (32, 512):
        matrix = torch.nn.Linear(width, 3 * width, bias=False)
        muon, _ = make_state(torch.nn.Sequential(Layers(matrix), torch.nn.LayerNorm(width)), config).optimizers
        x, y = (torch.randn(1, size, generator=torch.Generator().manual_seed(0)) for size in (width, 3 * width))
        before, matrix.weight.grad = matrix.weight.clone(), y.T @ x
        muon.step()
        changes.append(float(((matrix.weight - before * (1 - 1e-2 * 0.1)) @ x[0]).square().mean().sqrt()))
    assert changes[0] == pytest.approx(changes[1], rel=0.2)


def test_beside_muon_matrices_that_read_many_features_have_a_lower_rate() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(32, 512), Layers(torch.nn.Linear(512, 512)), torch.nn.Linear(512, 8))
    _, adamw = make_state(network, TrainingConfig(optimizer="muon", learning_rate=0.1)).optimizers
    rates = {weight: group["initial_lr"] for group in adamw.param_groups for weight in group["params"]}
    expected = {"0.weight": 0.1, "0.bias": 0.1, "1.0.bias": 0.1, "2.weight": 0.1 * 128 / 512, "2.bias": 0.1}
    assert {name: rates[network.get_parameter(name)] for name in expected} == expected
    assert len(rates) == len(expected)


def test_muon_is_refused_where_there_are_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"`optimizer` is muon, .* this network has none: set it to adamw"):
        make_state(torch.nn.Linear(2, 2), TrainingConfig(optimizer="muon"))


def test_the_rate_warms_up_linearly_then_stays_or_falls_as_half_a_cosine() -> None:
    constant = TrainingConfig(steps=100, warmup=10, learning_rate=0.5)
    assert [learning_rate(constant, step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    cosine = TrainingConfig(steps=110, warmup=10, learning_rate=0.5, decay="cosine")
    rates = [learning_rate(cosine, step) for step in (0, 9, 10, 35, 60, 85, 110)]
    half = math.sqrt(0.5) / 2
    assert rates == pytest.approx([0.05, 0.5, 0.5, 0.25 + half / 2, 0.25, 0.25 - half / 2, 0], abs=1e-12)
    assert learning_rate(TrainingConfig(warmup=0, learning_rate=0.5), 0) == 0.5
    rates = [learning_rate(replace(cosine, decay="linear"), step) for step in (9, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.5, 0.5, 0.375, 0.25, 0], abs=1e-12)
    rates = [learning_rate(replace(cosine, decay="trapezoid"), step) for step in (4, 10, 89, 90, 100, 110)]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.25, 0], abs=1e-12)


def test_ema_is_the_recursive_average_with_a_warming_decay() -> None:
    module = torch.nn.Linear(3, 2)
    ema, truth = Ema(module, 0.5), module.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        truth = decay * truth + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(ema.weights["weight"], truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.weights["bias"], module.bias)


def test_ema_is_a_copy() -> None:
    module = torch.nn.Linear(3, 2)
    ema, before = Ema(module, 0.999), module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(ema.weights["weight"], before)


def test_training_keeps_an_average_for_each_decay() -> None:
    config = TrainingConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup=0, ema_decay=[0.6, 0.0])
    state, alone = (make_state(tiny_prior(), c) for c in (config, replace(config, ema_decay=0.6)))
    for each in (state, alone):
        run(each, config, 6)
    slow, now = state.averages
    for name, weight in state.module.state_dict().items():
        assert torch.equal(now.weights[name], weight), name
        assert torch.equal(slow.weights[name], alone.averages[0].weights[name]), name
    assert not torch.equal(slow.weights["head.weight"], now.weights["head.weight"])


def test_a_batch_that_does_not_divide_is_named_with_the_workers() -> None:
    config = TrainingConfig(batch_size=12)
    assert [worker_share(config, world) for world in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(
        ValueError, match=r"`batch_size` is 12, .* 5 workers with `accumulate` 1; make it a multiple of 5"
    ):
        worker_share(config, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("clip_norm", -1.0)),
        *(("ema_decay", 1.0), ("ema_decay", [0.9, 1.0]), ("ema_decay", [])),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{field}` is {value}")):
        TrainingConfig(**{field: value})  # pyright: ignore[reportArgumentType]
