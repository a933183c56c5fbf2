from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.diffusion.process import DiffusionConfig
from bld_core.latents.loader import latent_batches
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import PriorConfig
from bld_core.training.checkpoint import read_state, said_by_first, save_state
from bld_core.training.loop import TrainingConfig, TrainState, make_state, train
from tests.bld_core.toys import random_latents, tiny_prior

CONFIG = TrainingConfig(steps=6, batch_size=8, warmup=2, learning_rate=1e-2, decay="linear", optimizer="muon")


def steps(state: TrainState, rank: int, world: int, count: int) -> None:
    batches = latent_batches(random_latents(22), CONFIG, 7, state.step, rank, world)
    objective = PriorObjective(DiffusionConfig(steps=16), PriorConfig(), seed=0)
    for _ in itertools.islice(train(state, batches, objective, CONFIG), count):
        pass


def everything(state: TrainState) -> dict[str, Tensor]:
    """The weights, and what each optimizer keeps of them."""
    tensors = dict(state.module.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        kept = optimizer.state_dict()["state"]
        tensors |= {f"{number} {weight} {kind}": x for weight, values in kept.items() for kind, x in values.items()}
    return tensors


def one_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole, first, second = (
        make_state(tiny_prior(seed=seed), CONFIG, partial(DistributedDataParallel)) for seed in (0, 0, 1)
    )
    steps(whole, rank, 2, 6)
    steps(first, rank, 2, 3)
    if rank == 0:
        save_state(f"{folder}/checkpoint", first, {})
    distributed.barrier()
    device = torch.device("cpu")
    saved = said_by_first(read_state(f"{folder}/checkpoint", 1) if rank == 0 else None, device)
    assert saved is not None
    assert said_by_first(saved if rank else None, device) is None
    saved.restore(second)
    steps(second, rank, 2, 3)
    torch.save([everything(state) for state in (whole, second)], f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # on few cores gloo's threads may outlive their group, and abort a process that ends in order


@pytest.mark.long
def test_muon_on_two_workers_is_the_same_on_both_interrupted_or_not(tmp_path: Path) -> None:
    spawn(one_worker, (tmp_path,), nprocs=2)
    found = [tensors for rank in range(2) for tensors in torch.load(tmp_path / f"{rank}.pt", weights_only=True)]
    truth = found[0]
    assert any("momentum_buffer" in name for name in truth)
    assert any("exp_avg_sq" in name for name in truth)
    for other in found[1:]:
        assert other.keys() == truth.keys()
        for name, tensor in truth.items():
            assert torch.equal(other[name], tensor), name
    assert truth["head.weight"].abs().max() > 0
