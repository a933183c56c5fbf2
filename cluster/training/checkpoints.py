"""Checkpoints and snapshots of a training: written, gone on from, chosen from, checked. Its folder is what counts."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import Any, Literal

from torch import Tensor

from bld_core.errors import DamagedError, UserError
from bld_core.storage import files
from bld_core.storage.files import FullError
from bld_core.storage.records import Fault, set_aside, sizes
from bld_core.training.averages import PowerEma, combination, combined
from bld_core.training.checkpoint import (
    META,
    SavedState,
    average_name,
    check_state,
    model_faults,
    on_host,
    read_meta,
    read_model_config,
    read_state,
    read_tensors,
    read_weights,
    said_by_first,
    save_model,
)
from bld_core.training.loop import TrainingConfig, TrainState
from cluster.config.experiment import Experiment
from cluster.stages import faulty
from cluster.training.tasks import Worker

FINAL, SNAPSHOTS = "final", "snapshots"
_CHECKPOINT = "checkpoint-"
_CHECKPOINTS_KEPT = 2
_HURRY_S = 10.0


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{_CHECKPOINT}{step:07d}"


def checkpoints(folder: str, *, whole: bool = True) -> list[str]:
    """The checkpoints of a stage, oldest first; also those that were never finished, unless they are to be whole."""
    there = files.listing(folder) if files.exists(folder) else []
    steps = {int(found[1]): name for name in there if (found := re.fullmatch(rf"{_CHECKPOINT}(\d{{7,}})", name))}
    urls = [files.join(folder, steps[step]) for step in sorted(steps)]
    return [url for url in urls if not whole or files.exists(files.join(url, META))]


def checkpoint_step(url: str) -> int:
    """The step that a checkpoint is called after."""
    return int(files.name(url).removeprefix(_CHECKPOINT))


def newest_step(folder: str) -> int:
    """The step of a stage's newest checkpoint; 0 where there is none."""
    return max((checkpoint_step(url) for url in checkpoints(folder)), default=0)


class Keeper:
    """Writes the checkpoints of a stage beside its training, one at a time, and keeps the two newest.

    Training waits for the copy into host memory, and for the write before it where that is still under way. A process
    that is killed meanwhile leaves the checkpoint before. An object of this class is a context: at its end the last
    write is waited for, of somebody who is in a hurry (Ctrl-C, a signal) only some seconds.

    Args:
        folder: of the stage.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.join(None if kind is None or issubclass(kind, Exception) else _HURRY_S)

    def keep(self, saved: SavedState) -> None:
        """Begin to write a copy of the state; `wait` before it is made, so that there is one at a time.

        Raises:
            FullError: no space for it, or for the checkpoint before; or another reason why that was not written.
        """
        self.wait()
        url = files.join(self._folder, checkpoint_name(saved.meta["step"]))
        files.check_space(saved.sizes(url))  # a full disk is told at once, not a checkpoint later
        self._thread = threading.Thread(target=self._write, args=(url, saved), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write that is under way; its errors are those of `keep`."""
        if self._thread is not None:
            self._thread.join()
        self.look()

    def look(self) -> None:
        """Raise what has kept the last checkpoint from being written, if that is known by now."""
        if self._failure is not None:
            raise self._failure

    def _write(self, url: str, saved: SavedState) -> None:
        try:
            saved.write(url)
            for old in checkpoints(self._folder)[:-_CHECKPOINTS_KEPT]:
                files.remove(old)
        except FullError as error:  # an unfinished one is of no use, and others need its space: MLflow's database, say
            if not files.exists(files.join(url, META)):
                with contextlib.suppress(OSError, UserError):
                    files.remove(url)
            self._failure = error
        except Exception as error:  # it is raised where training looks for it
            self._failure = error


def resume(label: str, folder: str, state: TrainState, worker: Worker) -> list[list[int]]:
    """Put the newest checkpoint that is good into the state; returns the workers' positions in the data.

    Rank 0 reads it, and hands it to the others. A damaged one is named and set aside, and the one before is taken.
    """
    saved = said_by_first(_newest(label, folder, state) if worker.rank == 0 else None, worker.device)
    if saved is None:
        return []
    saved.restore(state)
    return saved.meta["positions"]


def _newest(label: str, folder: str, state: TrainState) -> SavedState | None:
    """The newest checkpoint that is good, and a line for each that is not, and for what is lost by that."""
    there = checkpoints(folder, whole=False)
    last, saved = (checkpoint_step(there[-1]) if there else 0), None
    while there and saved is None:
        url = there.pop()
        saved, fault = _read(url, state)
        if fault:
            _give_up(label, url, fault)
    step = 0 if saved is None else saved.meta["step"]
    if step < last:
        sys.stderr.write(
            f"{label}: going on from step {step}; the {last - step} steps up to {last} are lost and taken again\n"
        )
    return saved


def _read(url: str, state: TrainState) -> tuple[SavedState | None, str]:
    """A checkpoint; or what is wrong with it."""
    if not files.exists(files.join(url, META)):
        return None, f"{url!r} was never finished: {META}, which is written last, is missing"
    try:
        saved = read_state(url, len(state.averages), critic=state.critic is not None)
    except DamagedError as error:
        return None, f"{error.url!r} {error.reason}"
    if saved.meta["step"] != checkpoint_step(url):
        return None, f"{files.join(url, META)!r} says step {saved.meta['step']}: it belongs to another checkpoint"
    return saved, ""


def _give_up(label: str, url: str, fault: str) -> None:
    """Name a checkpoint that cannot be used, and set it aside; one that was never finished is written anew later."""
    unfinished = files.name(url) not in sizes(url.rpartition("/")[0]) and not files.exists(files.join(url, META))
    aside = "" if unfinished else f"; set aside as {set_aside(url)!r}"
    sys.stderr.write(f"{label}: {fault}{aside}\n")


def keep_snapshot(folder: str, state: TrainState, worker: Worker) -> None:
    """Write the averages that averages of other lengths are made of, as they are now, beneath a stage's folder.

    Rank 0 writes; where weights are shared out, every worker has a part.
    """
    for average in state.averages:
        if isinstance(average, PowerEma):
            weights = on_host(average.weights)
            if worker.rank == 0:
                url = files.join(folder, SNAPSHOTS, f"{state.step:07d}-{average.length:g}")
                save_model(url, weights, {"step": state.step, "length": average.length})


def candidates(
    state: TrainState, folder: str, training: TrainingConfig, worker: Worker
) -> list[tuple[str, float, dict[str, Tensor]]]:
    """The averages to choose from: what its decay or relative length is called, its value, and the weights.

    After the last step those are among them that rank 0 makes of the snapshots in the stage's folder, for all workers.
    """
    found = [
        ("ema_length", average.length, average.weights)
        if isinstance(average, PowerEma)
        else ("ema_decay", average.decay, average.weights)
        for average in state.averages
    ]
    if state.step == training.steps and training.ema_lengths:
        made = None
        if worker.rank == 0:
            averages = {f"{length}": average_of_length(folder, length) for length in training.ema_lengths}
            made = SavedState({}, averages, None)
        made = said_by_first(made, worker.device)
        assert made is not None, "rank 0 has made them"
        found += [("ema_length", length, dict(made.tensors[f"{length}"])) for length in training.ema_lengths]
    return found


def chosen_weights(folder: str, training: TrainingConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of the last evaluation of a stage, and the weights of the average that it has chosen."""
    newest = checkpoints(folder)[-1]  # the last step always saves one
    meta = read_meta(newest)
    metrics = meta["metrics"]
    if (length := metrics.get("ema_length")) is not None:
        return metrics, average_of_length(folder, length)
    return metrics, read_tensors(newest, meta, average_name(training.ema_decays.index(metrics["ema_decay"])))


def average_of_length(folder: str, length: float) -> dict[str, Tensor]:
    """The average of a relative length at the last snapshot of a stage's folder; a damaged snapshot is named, not used.

    Raises:
        DamagedError: none is left.
    """
    kept: list[tuple[str, dict[str, Any]]] = []
    for name in sorted(files.listing(files.join(folder, SNAPSHOTS))):
        url = files.join(folder, SNAPSHOTS, name)
        if faults := model_faults(url, deep=True):
            sys.stderr.write(f"{faults[0].url!r} {faults[0].reason}: averages are made without it\n")
        else:
            kept.append((url, read_model_config(url)))
    if not kept:
        raise DamagedError(files.join(folder, SNAPSHOTS), "holds no snapshot that is whole: train again")
    coefficients = combination([(config["step"], config["length"]) for _, config in kept], length)
    return combined(coefficients, (read_weights(url, config["hash"]) for url, config in kept))


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


def verify_training(experiment: Experiment, stage: Literal["autoencoder", "decoder", "prior"]) -> str:
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
