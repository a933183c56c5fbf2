"""A stage and its folder: done, resumed, refused or started afresh; one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import Timeout, UnixFileLock

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.storage.addresses import without_query
from cluster.config.experiment import BEFORE, Experiment
from cluster.console import COMMANDS
from cluster.runtime import connect_ray
from cluster.secrets import without_secrets

if TYPE_CHECKING:
    from cluster.tracking.runs import Run

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """An open stage: nobody else works in its folder until it is closed.

    Attributes:
        experiment: its configuration.
        name: of the stage and of its folder.
        run: the MLflow run.
        done: the stage was finished earlier; there is nothing to do.
    """

    experiment: Experiment
    name: str
    run: Run
    done: bool

    @property
    def folder(self) -> str:
        """<root>/<name>/<stage>."""
        return files.join(self.experiment.folder, self.name)


@contextlib.contextmanager
def open_stage(
    experiment: Experiment,
    name: str,
    fingerprint: Mapping[str, object],
    result: str,
    *,
    fresh: bool = False,
    on_change: Literal["refuse", "redo"] = "refuse",
) -> Generator[Stage]:
    """Open a stage for work, or find it done.

    Args:
        experiment: its configuration.
        name: of the stage, and of its folder within the experiment's.
        fingerprint: what decides the stage's result: configuration, and hashes of what it is made from.
        result: the file, within the stage's folder, whose presence means that the stage is finished.
        fresh: delete what is there and start over.
        on_change: what to do with a stage of another fingerprint: keep it safe, or make it again (cheap results).

    Raises:
        UserError: the folder cannot be written, is in use, or holds a stage of another fingerprint; or the Ray cluster
            is too small for the work. Nothing is deleted then.
    """
    # MLflow takes 1.5 s of a core to import: only commands open stages, and their actors do without it.
    from cluster.tracking.runs import Ending, known_run, start_run
    from cluster.tracking.store import open_client

    folder = files.join(experiment.folder, name)
    fingerprint = _public(json.loads(json.dumps(fingerprint)))  # as it will be read back: lists for tuples
    try:
        files.check_writable(experiment.folder)
    except UserError as error:
        raise UserError(f"root is {experiment.root!r}: {error}") from error
    with _lock(folder):
        record_url = files.join(folder, RECORD)
        record = files.read_json(record_url) if files.exists(record_url) and not fresh else None
        outdated = fresh
        if record is not None and (before := _as_of_now(_public(record["fingerprint"]), fingerprint)) != fingerprint:
            if on_change == "refuse":
                raise UserError(_changes(folder, name, before, fingerprint))
            record, outdated = None, True
        elif record is None and not fresh and files.exists(folder) and files.listing(folder):
            raise UserError(
                f"{folder!r} holds files but no {RECORD}, so it was not made here: move them away, choose another "
                f"--name, or delete them with {_anew(name)}"
            )
        if record is not None and files.exists(files.join(folder, result)):
            print(f"{name}: already done in {folder}", flush=True)
            yield Stage(experiment, name, known_run(experiment, name, record["run"]), done=True)
            return
        open_client(experiment.tracking.resolve(experiment.root), experiment.tracking.patience)  # soonest refused
        connect_ray(experiment.cluster)
        run = start_run(experiment, name, record["run"] if record else None)
        if outdated:  # only now, when nothing else can refuse the start
            files.remove(folder)
        if record is None or record["run"] != run.run_id:
            files.write_json(record_url, {"run": run.run_id, "fingerprint": fingerprint})
        how: Ending = "KILLED"  # by Ctrl-C or a signal
        try:
            yield Stage(experiment, name, run, done=False)
            how = "FINISHED"
        except Exception:
            how = "FAILED"
            raise
        finally:
            run.end(how)


def _public(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """A fingerprint without the signatures of links, which are new each time."""

    def public(value: object) -> object:
        return without_secrets(without_query(value)) if isinstance(value, str) else value

    return {name: public(value) for name, value in fingerprint.items()}


def _as_of_now(fingerprint: dict[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """A stored fingerprint, with the settings that an older version did not have yet."""
    return {name: value for name, value in BEFORE.items() if name in now} | fingerprint


def _anew(name: str) -> str:
    """The one command that makes a stage again."""
    stage = name.split("/")[0]
    return f"pipelines/{COMMANDS.get(stage, stage)} --fresh"


def _changes(folder: str, name: str, before: Mapping[str, object], now: Mapping[str, object]) -> str:
    fields = sorted(before.keys() | now.keys())
    changed = [f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in fields if before.get(key) != now.get(key)]
    return "\n".join(
        [
            f"{folder!r} was made with other settings or from other inputs (then -> now):",
            *changed,
            f"set them back to go on, choose another --name, or make the stage anew: {_anew(name)}",
        ]
    )


@contextlib.contextmanager
def _lock(folder: str) -> Generator[None]:
    """Hold the stage's lock; the operating system lets go of it when this process ends, however it ends.

    Object stores have no locks. Two encoders of one folder there do no harm: each writes the same bytes under the same
    names, whole files only, and deletes nothing that it did not find outdated when it began.
    """
    if not files.is_local(folder):
        yield
        return
    path = Path(f"{files.filesystem(folder)[1]}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = UnixFileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{folder!r} is in use by process {path.read_text().strip() or '?'}: wait for it, stop it, "
            "or choose another --name"
        ) from error
    with held:
        path.write_text(f"{os.getpid()} on {os.uname().nodename}")
        yield
