"""What the tasks do beside training, by one worker or by several."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from cluster.config.artifacts import open_codes
from cluster.config.experiment import Experiment
from cluster.training.tasks import AutoencoderTask, Evaluation, PriorTask, Worker
from tests.conftest import copy_of


def evaluations(experiment: Experiment, worker: Worker) -> tuple[int, list[Evaluation]]:
    """What fresh networks are worth, and which of two priors is better."""
    stages = AutoencoderTask(experiment), PriorTask(experiment, experiment.folder, open_codes(experiment.folder))
    with torch.no_grad():
        torch.manual_seed(0)
        found = [task.evaluate(task.network().eval(), worker) for task in stages]
        return stages[1].choose([stages[1].network().eval() for _ in range(2)], worker), found


def one_of_two(rank: int, experiment: Experiment, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    best, found = evaluations(experiment, Worker(rank, 2, torch.device("cpu")))
    for number, (metrics, pictures, per_code) in enumerate(found):
        torch.save({"metrics": metrics, "per_code": per_code, "best": best}, folder / f"{rank}-{number}.pt")
        for name, picture in pictures.items():
            picture.save(folder / f"{rank}-{name}.png")
    distributed.barrier()
    os._exit(0)  # on few cores gloo's threads may outlive their group, and abort a process that ends in order


@pytest.mark.long
def test_an_evaluation_that_two_workers_share_is_that_of_one_bit_by_bit(encoded: Experiment, tmp_path: Path) -> None:
    experiment = replace(encoded, root=str(copy_of(encoded, tmp_path, "autoencoder", "latents")))
    spawn(one_of_two, (experiment, tmp_path), nprocs=2)
    torch.set_num_threads(1)
    best, found = evaluations(experiment, Worker(0, 1, torch.device("cpu")))
    for number, (metrics, pictures, per_code) in enumerate(found):
        for rank in range(2):
            shared = torch.load(tmp_path / f"{rank}-{number}.pt", weights_only=True)
            assert shared == {"metrics": metrics, "per_code": per_code, "best": best}
        assert len(pictures) == 2
        for name, picture in pictures.items():
            assert not (tmp_path / f"1-{name}.png").exists(), "the first has them"
            picture.save(tmp_path / "alone.png")
            assert (tmp_path / f"0-{name}.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
