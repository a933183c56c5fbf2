"""The checkpoints of a stage of training: found, gone on from, and checked. The stage's folder is what counts."""

from __future__ import annotations

import re
import sys
from typing import Literal

from bld_core.errors import DamagedError
from bld_core.storage import files
from bld_core.storage.records import Fault, set_aside, sizes
from bld_core.training.checkpoint import META, SavedState, check_state, model_faults, read_state
from bld_core.training.loop import TrainState
from cluster.config.experiment import Experiment
from cluster.stages import faulty
from cluster.training.tasks import Worker

FINAL = "final"
_CHECKPOINT = "checkpoint-"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{_CHECKPOINT}{step:07d}"


def checkpoints(folder: str, *, whole: bool = True) -> list[str]:
    """The checkpoints of a stage, oldest first; also those that were never finished, unless they are to be whole."""
    there = files.listing(folder) if files.exists(folder) else []
    steps = {int(found[1]): name for name in there if (found := re.fullmatch(rf"{_CHECKPOINT}(\d{{7,}})", name))}
    urls = [files.join(folder, steps[step]) for step in sorted(steps)]
    return [url for url in urls if not whole or files.exists(files.join(url, META))]


def _step_of(url: str) -> int:
    """The step that a checkpoint is called after."""
    return int(files.name(url).removeprefix(_CHECKPOINT))


def resume(label: str, folder: str, state: TrainState, worker: Worker) -> list[list[int]]:
    """Put the newest checkpoint that is good into the state; returns the workers' positions in the data.

    A damaged one is named, set aside by rank 0, and the one before is taken. What is good is decided by all together.
    """
    mine = checkpoints(folder, whole=False) if worker.rank == 0 else []
    there = worker.said_by_first(mine)
    last, saved = (_step_of(there[-1]) if there else 0), None
    while there and saved is None:
        url = there.pop()
        saved, fault = _read(url, state)
        if faults := worker.said_by_all(fault):
            saved = None
            _give_up(label, url, faults, worker)
    if saved is not None:
        saved.restore(state)
    if worker.rank == 0 and state.step < last:
        sys.stderr.write(
            f"{label}: going on from step {state.step}; the {last - state.step} steps up to {last} are lost and "
            "taken again\n"
        )
    return [] if saved is None else saved.meta["positions"]


def _read(url: str, state: TrainState) -> tuple[SavedState | None, str]:
    """A checkpoint; or what is wrong with it."""
    if not files.exists(files.join(url, META)):
        return None, f"{url!r} was never finished: {META}, which is written last, is missing"
    try:
        saved = read_state(url, len(state.averages), critic=state.critic is not None)
    except DamagedError as error:
        return None, f"{error.url!r} {error.reason}"
    if saved.meta["step"] != _step_of(url):
        return None, f"{files.join(url, META)!r} says step {saved.meta['step']}: it belongs to another checkpoint"
    return saved, ""


def _give_up(label: str, url: str, faults: str, worker: Worker) -> None:
    """Name a checkpoint that cannot be used, and set it aside; one that was never finished is written anew later."""
    if worker.rank:
        return
    unfinished = files.name(url) not in sizes(url.rpartition("/")[0]) and not files.exists(files.join(url, META))
    aside = "" if unfinished else f"; set aside as {set_aside(url)!r}"
    sys.stderr.write(f"{label}: {faults}{aside}\n")


def training_faults(folder: str, deep: bool) -> list[Fault]:
    """What is wrong with the finished model of a stage; with `deep`, every byte of it and of its checkpoints is read.

    A damaged checkpoint is then named and set aside: the model does not need it.
    """
    if deep:
        for fault in _checkpoint_faults(folder):
            checkpoint = next(url for url in checkpoints(folder) if fault.url.startswith(f"{url}/"))
            sys.stderr.write(f"{fault.url!r} {fault.reason}; set aside as {set_aside(checkpoint)!r}\n")
    return model_faults(files.join(folder, FINAL), deep=deep)


def _checkpoint_faults(folder: str) -> list[Fault]:
    """The first fault of each damaged checkpoint."""
    found: list[Fault] = []
    for url in checkpoints(folder):
        try:
            check_state(url)
        except DamagedError as error:
            found.append(Fault(error.url, error.reason))
    return found


def verify_training(experiment: Experiment, stage: Literal["autoencoder", "prior"]) -> str:
    """Read a finished stage of training again, model and checkpoints; returns what was found, as a line of text.

    Raises:
        MissingError: the stage is not finished.
        UserError: files that are not what was written, each named.
    """
    folder = files.join(experiment.folder, stage)
    faults = model_faults(files.join(folder, FINAL), deep=True) + _checkpoint_faults(folder)
    if faults:
        raise faulty(stage, folder, faults)
    return (
        f"verified {files.join(folder, FINAL)!r} and {len(checkpoints(folder))} checkpoints: all is as it was written"
    )
