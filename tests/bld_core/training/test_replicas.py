from __future__ import annotations

import copy
import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.diffusion.process import DiffusionConfig
from bld_core.latents.loader import latent_batches
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import PriorConfig
from bld_core.training.checkpoint import read_state, said_by_first, save_state
from bld_core.training.loop import TrainingConfig, TrainState, make_state, train
from bld_core.training.replicas import ReducePrecision, reduce_gradients_in
from tests.bld_core.toys import random_latents, tiny_prior

CONFIG = TrainingConfig(steps=6, batch_size=8, warmup=2, learning_rate=1e-2, decay="linear", optimizer="muon")
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "bfloat16": {"reduce_precision": "bfloat16", "accumulate": 2}}
"""What each pair of trainings changes of it."""


def steps(state: TrainState, config: TrainingConfig, rank: int, world: int, count: int) -> None:
    batches = latent_batches(random_latents(22), config, 7, state.step, rank, world)
    objective = PriorObjective(DiffusionConfig(steps=16), PriorConfig(), seed=0)
    for _ in itertools.islice(train(state, batches, objective, config), count):
        pass


def everything(state: TrainState) -> dict[str, Tensor]:
    """The weights, and what each optimizer keeps of them."""
    tensors = dict(state.module.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        kept = optimizer.state_dict()["state"]
        tensors |= {f"{number} {weight} {kind}": x for weight, values in kept.items() for kind, x in values.items()}
    return tensors


def gradients(rank: int, precision: ReducePrecision) -> tuple[Tensor, Tensor]:
    """Of a layer's weights, beside those of the other worker: its own, and what both get."""
    torch.manual_seed(0)
    alone = nn.Linear(300, 5)
    replica = reduce_gradients_in(
        DistributedDataParallel(copy.deepcopy(alone), gradient_as_bucket_view=True), precision
    )
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(rank))
    for each in (alone, replica):
        each(x).square().sum().backward()
    own, [shared, _] = alone.weight.grad, (weights.grad for weights in replica.parameters())
    assert own is not None
    assert shared is not None
    return own, shared


def whole_and_resumed(rank: int, folder: str, config: TrainingConfig) -> list[dict[str, Tensor]]:
    """Everything after six steps of this worker: without an interruption, and with one after three."""
    whole, first, second = (
        make_state(tiny_prior(seed=seed), config, partial(DistributedDataParallel)) for seed in (0, 0, 1)
    )
    steps(whole, config, rank, 2, 6)
    steps(first, config, rank, 2, 3)
    if rank == 0:
        save_state(folder, first, {})
    distributed.barrier()
    device = torch.device("cpu")
    saved = said_by_first(read_state(folder, 1) if rank == 0 else None, device)
    assert saved is not None
    assert said_by_first(saved if rank else None, device) is None
    saved.restore(second)
    steps(second, config, rank, 2, 3)
    return [everything(state) for state in (whole, second)]


def one_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ends = {
        name: whole_and_resumed(rank, f"{folder}/{name}", replace(CONFIG, **fields)) for name, fields in WAYS.items()
    }
    torch.save(ends, f"{folder}/{rank}.pt")
    torch.save([gradients(rank, precision) for precision in get_args(ReducePrecision)], f"{folder}/{rank}-gradients.pt")
    distributed.barrier()
    os._exit(0)  # on few cores gloo's threads may outlive their group, and abort a process that ends in order


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two has saved."""
    folder = tmp_path_factory.mktemp("replicas")
    spawn(one_worker, (folder,), nprocs=2)
    return folder


@pytest.mark.long
def test_muon_on_two_workers_is_the_same_on_both_interrupted_or_not(two_workers: Path) -> None:
    ranks = [torch.load(two_workers / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in WAYS:
        check_all_the_same([tensors for ends in ranks for tensors in ends[name]])
    plain, rounded = (ranks[0][name][0]["head.weight"] for name in WAYS)
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(rounded, plain, rtol=0.1, atol=0.02)


def check_all_the_same(found: list[dict[str, Tensor]]) -> None:
    truth = found[0]
    assert any("momentum_buffer" in name for name in truth)
    assert any("exp_avg_sq" in name for name in truth)
    for other in found[1:]:
        assert other.keys() == truth.keys()
        for name, tensor in truth.items():
            assert torch.equal(other[name], tensor), name
    assert truth["head.weight"].abs().max() > 0


@pytest.mark.long
def test_gradients_travel_in_the_precision_asked_for(two_workers: Path) -> None:
    ranks = [torch.load(two_workers / f"{rank}-gradients.pt", weights_only=True) for rank in range(2)]
    (one, exact), (_, rounded) = ranks[0]
    (other, _), _ = ranks[1]
    torch.testing.assert_close(exact, (one + other) / 2)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())
    scale = torch.maximum(one.abs(), other.abs())
    assert ((rounded - exact).abs() <= (2**-8 + 2**-8) * scale).all()  # the parts are rounded to 8 bits, and their mean
    for (_, here), (_, there) in zip(*ranks, strict=True):
        assert torch.equal(here, there)


def test_a_module_of_one_worker_sends_nothing() -> None:
    alone = nn.Linear(3, 2)
    assert reduce_gradients_in(alone, "bfloat16") is alone
