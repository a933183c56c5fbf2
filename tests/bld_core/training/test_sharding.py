"""Weights shared out over two real processes, beside the same training with a copy on each."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.diffusion.process import DiffusionConfig
from bld_core.errors import NonFiniteError
from bld_core.latents.loader import latent_batches
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import PriorConfig
from bld_core.training.checkpoint import read_state, said_by_first, save_state, snapshot
from bld_core.training.loop import Batch, TrainingConfig, TrainState, make_state, train
from bld_core.training.sharding import is_sharded, own, own_rows, shard, shared_as, whole, whole_share
from tests.bld_core.toys import random_latents, tiny_prior

CONFIG = TrainingConfig(
    steps=6, batch_size=8, warmup=2, learning_rate=1e-2, decay="linear", ema_decay=[0.9, 0.5], ema_lengths=[0.1]
)
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "muon": {"optimizer": "muon", "accumulate": 2, "checkpointing": True},
    "bfloat16": {"optimizer": "muon", "precision": "bfloat16", "reduce_precision": "bfloat16"},
}
"""What each pair of trainings changes of it."""
CPU = torch.device("cpu")


def batches(state: TrainState, config: TrainingConfig, rank: int) -> Any:
    return latent_batches(random_latents(22), config, 7, state.step, rank, 2)


def steps(state: TrainState, config: TrainingConfig, rank: int, count: int) -> None:
    objective = PriorObjective(DiffusionConfig(steps=16), PriorConfig(), seed=0)
    for _ in itertools.islice(train(state, batches(state, config, rank), objective, config), count):
        pass


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything of a state, whole, on the first replica."""
    return {f"{part} {name}": x for part, table in snapshot(state, {}).tensors.items() for name, x in table.items()}


def whole_and_resumed(rank: int, folder: str, config: TrainingConfig) -> dict[str, dict[str, Tensor]]:
    """Everything after six steps: of replicas, and of shared weights without and with an interruption after three."""
    split = partial(shard, device=CPU, reduce_precision=config.reduce_precision)
    copied, once = (make_state(tiny_prior(), config, wrap) for wrap in (partial(DistributedDataParallel), split))
    steps(copied, config, rank, 6)
    steps(once, config, rank, 3)
    save_state_of_first(rank, folder, once)
    steps(once, config, rank, 3)
    again = make_state(tiny_prior(seed=1), config, split)
    saved = said_by_first(read_state(folder, len(again.averages)) if rank == 0 else None, CPU)
    assert saved is not None
    saved.restore(again)
    steps(again, config, rank, 3)
    after, resumed = tensors(once), tensors(again)
    copies = tensors(copied)
    snapshot(copied, {}).restore(again)
    for name, x in tensors(again).items():
        assert rank or torch.equal(x, copies[name]), "shares of copies are the copies again"
    return {"copied": copies, "once": after, "again": resumed}


def save_state_of_first(rank: int, folder: str, state: TrainState) -> None:
    """`save_state`, whose copy all replicas have a part in."""
    if rank == 0:
        save_state(folder, state, {})
    else:
        assert not any(x.ndim for table in snapshot(state, {}).tensors.values() for x in table.values())
    distributed.barrier()


def check_kept(rank: int) -> None:
    """Each replica keeps half of everything, or what is left of an odd number of rows."""
    module = tiny_prior()
    sizes = {name: weight.shape for name, weight in module.named_parameters()}
    state = make_state(module, replace(CONFIG, optimizer="muon"), partial(shard, device=CPU))
    steps(state, replace(CONFIG, optimizer="muon"), rank, 1)
    assert all(is_sharded(weight) for weight in module.parameters())
    for name, weight in module.named_parameters():
        rows = -(-sizes[name][0] // 2)
        kept = min(rows, max(0, sizes[name][0] - rank * rows))
        moments = [x for each in state.optimizers for x in each.state.get(weight, {}).values() if x.ndim]
        averages = [average.weights[name] for average in state.averages]
        assert moments
        for x in [weight, weight.grad, *moments, *averages]:
            assert x is not None
            assert own(x).shape == (kept, *sizes[name][1:]), name
            assert whole(x).shape == sizes[name]


def check_stacks(rank: int) -> None:
    layer = shard(nn.Linear(4, 5), CPU)
    assert isinstance(layer.weight, Tensor)
    matrices = torch.arange(3 * 5 * 4.0).view(3, 5, 4)
    parts = torch.stack([own(shared_as(matrix, layer.weight)) for matrix in matrices])
    assert torch.equal(parts, matrices[:, :3] if rank == 0 else matrices[:, 3:])
    share = whole_share(parts, layer.weight)
    assert torch.equal(share, matrices[:2] if rank == 0 else matrices[2:])
    assert torch.equal(own_rows(share, layer.weight, 3), parts)


def check_bad_step(rank: int) -> dict[str, str]:
    """A sample of the second worker that is not finite: nothing has changed, and it is named."""
    config = replace(CONFIG, non_finite="stop")
    state = make_state(tiny_prior(), config, partial(shard, device=CPU))
    honest = PriorObjective(DiffusionConfig(steps=16), PriorConfig(), seed=0)
    before = tensors(state)

    def objective(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        factor = torch.where((batch.sample_index == 5).any(), torch.nan, 1.0)
        return {name: value * factor for name, value in honest(state, batch).items()}

    said = ""
    try:
        next(train(state, batches(state, config, rank), objective, replace(config, log_every=1)))
    except NonFiniteError as error:
        said = str(error)
    after = tensors(state)
    for name, x in before.items():
        if name.startswith("model"):
            assert torch.equal(after[name], x), name
    return {"said": said}


def one_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {
        name: whole_and_resumed(rank, f"{folder}/{name}", replace(CONFIG, **fields)) for name, fields in WAYS.items()
    }
    check_kept(rank)
    check_stacks(rank)
    found["bad"] = check_bad_step(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # on few cores gloo's threads may outlive their group, and abort a process that ends in order


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers has found."""
    folder = tmp_path_factory.mktemp("sharding")
    spawn(one_worker, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_shared_weights_learn_what_copies_learn_and_go_on_where_they_were(way: str, ends: list[dict[str, Any]]) -> None:
    first, _ = ends
    copied, once, again = (first[way][name] for name in ("copied", "once", "again"))
    assert copied.keys() == once.keys() == again.keys()
    assert any(kind in name for name in once for kind in ("momentum_buffer", "exp_avg_sq"))
    rtol, atol = (0.1, 0.02) if way == "bfloat16" else (1e-3, 1e-5)  # how sums are rounded differs
    for name, x in once.items():
        torch.testing.assert_close(x, copied[name], rtol=rtol, atol=atol, msg=name)
        assert torch.equal(x, again[name]), name


@pytest.mark.long
def test_a_step_that_is_not_finite_changes_nothing_and_the_sample_is_named(ends: list[dict[str, Any]]) -> None:
    said = [end["bad"]["said"] for end in ends]
    assert all("step 1: the loss or its gradient is not finite" in each for each in said)
    assert sum("sample '" in each for each in said) == 1, said


def test_a_network_of_one_worker_stays_whole() -> None:
    alone = nn.Linear(3, 2)
    assert shard(alone, CPU) is alone
    assert whole(alone.weight) is alone.weight
    assert own(alone.weight) is alone.weight
    assert shared_as(alone.bias, alone.weight) is alone.bias
