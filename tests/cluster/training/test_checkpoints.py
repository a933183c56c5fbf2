"""Checkpoints that are written beside training: what they hold, and what a kill or a failed write leaves."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from bld_core.prior.transformer import Prior, PriorConfig
from bld_core.storage import files
from bld_core.storage.files import FullError
from bld_core.training.checkpoint import load_state, save_state, snapshot
from bld_core.training.loop import TrainingConfig, TrainState, make_state
from cluster.training.checkpoints import Keeper, checkpoints, resume
from cluster.training.tasks import Worker
from tests.bld_core.toys import perturb, tiny_prior

CONFIG = TrainingConfig(steps=9, batch_size=4)
NOTHING = {"positions": [], "metrics": {}}
ALONE = Worker(0, 1, torch.device("cpu"))


def at_step(state: TrainState, step: int) -> TrainState:
    """The state after some training."""
    state.step = step
    perturb(state.module)
    state.averages[0].update(state.module, step)
    return state


def test_what_is_written_is_the_state_of_its_step_while_training_goes_on(tmp_path: Path) -> None:
    state, folder = make_state(tiny_prior(), CONFIG), str(tmp_path / "stage")
    with Keeper(folder) as keeper:
        for step in (1, 2, 3, 4):
            at_step(state, step)
            save_state(str(tmp_path / f"whole-{step}"), state, {"positions": [[step]], "metrics": {"x": 0.5}})
            keeper.keep(snapshot(state, {"positions": [[step]], "metrics": {"x": 0.5}}))
            for weight in state.module.parameters():
                weight.data.fill_(torch.nan)
    assert [files.name(url) for url in checkpoints(folder)] == ["checkpoint-0000003", "checkpoint-0000004"]
    for step in (3, 4):
        whole = tmp_path / f"whole-{step}"
        written = {path.name: path.read_bytes() for path in Path(folder, f"checkpoint-{step:07d}").iterdir()}
        assert written == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_a_checkpoint_that_could_not_be_written_is_told_to_training(tmp_path: Path) -> None:
    state, folder = make_state(tiny_prior(), CONFIG), str(tmp_path / "stage")
    Path(folder).write_text("a file in its place")
    with Keeper(folder) as keeper:
        keeper.keep(snapshot(at_step(state, 1), NOTHING))
        with pytest.raises(OSError, match="stage"):
            keeper.keep(snapshot(at_step(state, 2), NOTHING))
        with pytest.raises(OSError, match="stage"):
            keeper.look()


def test_a_full_disk_is_told_before_anything_is_written(disk: Path) -> None:
    state = make_state(Prior(PriorConfig(layers=2, width=96, heads=2), 4, 8), CONFIG)
    model = sum(weight.nbytes for weight in state.module.state_dict().values())
    with Keeper(str(disk / "stage")) as keeper:
        keeper.keep(snapshot(at_step(state, 1), NOTHING))
        keeper.wait()
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 3 * model // 2))  # room for one of two files
        free = shutil.disk_usage(disk).free
        with pytest.raises(FullError, match=rf"no space for '.*checkpoint-0000002/ema\.safetensors' of {model:,} "):
            keeper.keep(snapshot(at_step(state, 2), NOTHING))
    assert shutil.disk_usage(disk).free == free
    assert [path.name for path in (disk / "stage").iterdir()] == ["checkpoint-0000001"]


def test_what_could_be_written_of_a_checkpoint_is_taken_away_where_the_rest_could_not(tmp_path: Path) -> None:
    state, folder = make_state(tiny_prior(), CONFIG), tmp_path / "stage"
    for weight in state.module.parameters():
        weight.grad = torch.ones_like(weight)
    for optimizer in state.optimizers:
        optimizer.step()  # its two moments make the larger file
    model = sum(weight.nbytes for weight in state.module.state_dict().values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Keeper(str(folder)) as keeper:
        resource.setrlimit(resource.RLIMIT_FSIZE, (7 * model // 4, before[1]))  # a limit of which no disk tells
        try:
            keeper.keep(snapshot(at_step(state, 1), NOTHING))
            with pytest.raises(FullError, match=r"no space for '.*checkpoint-0000001/optimizer\.safetensors'"):
                keeper.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*folder.iterdir()] == []


def keep_and_die(folder: str) -> None:
    prior = Prior(PriorConfig(layers=4, width=512, heads=2), 4, 8)  # some 0.1 s to write
    with Keeper(folder) as keeper:
        state = at_step(make_state(prior, CONFIG), 3)
        keeper.keep(snapshot(state, NOTHING))
        keeper.wait()
        keeper.keep(snapshot(at_step(state, 5), NOTHING))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_commit_leaves_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "stage")
    process = multiprocessing.get_context("fork").Process(target=keep_and_die, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [files.name(url) for url in checkpoints(folder)] == ["checkpoint-0000003"]
    state = make_state(Prior(PriorConfig(layers=4, width=512, heads=2), 4, 8), CONFIG)
    resume("prior", folder, state, ALONE)
    assert state.step == 3
    load_state(checkpoints(folder)[0], make_state(state.module, CONFIG))
    if checkpoints(folder, whole=False) != checkpoints(folder):
        assert "the 2 steps up to 5 are lost and taken again" in capsys.readouterr().err
