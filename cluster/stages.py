"""A stage and its folder: done, resumed, refused or started afresh; one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import Timeout, UnixFileLock

from bld_core.errors import DamagedError, UserError
from bld_core.storage import files
from bld_core.storage.addresses import without_query
from bld_core.storage.lease import BEAT_S, BEATS, Lease
from bld_core.storage.records import Fault, named_faults, part_of, read_record, set_aside, write_record
from cluster.config.experiment import BEFORE, Experiment
from cluster.console import COMMANDS
from cluster.nodes.watch import check_access, ended_by
from cluster.runtime import connect_ray
from cluster.secrets import without_secrets

if TYPE_CHECKING:
    from cluster.tracking.runs import Run

RECORD = "stage.json"
_COPY = "stage.copy.json"  # a stage whose record is damaged would be lost otherwise, with all its checkpoints


@dataclass(frozen=True)
class Stage:
    """An open stage: nobody else works in its folder until it is closed.

    Attributes:
        experiment: its configuration.
        name: of the stage and of its folder.
        run: the MLflow run.
        done: the stage was finished earlier; there is nothing to do.
        result: the file that is written last.
        record: what the stage's record says of it.
    """

    experiment: Experiment
    name: str
    run: Run
    done: bool
    result: str
    record: Mapping[str, object]
    _written: dict[str, dict[str, int | str]] = field(default_factory=dict[str, dict[str, int | str]])

    @property
    def folder(self) -> str:
        """<root>/<name>/<stage>."""
        return files.join(self.experiment.folder, self.name)

    def url(self, file: str) -> str:
        """Of a file or folder in the stage's folder."""
        return files.join(self.folder, file)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the stage. Its record then knows it, from the time at which the result, the last, appears."""
        self._written[name] = part_of(data)
        if name == self.result:
            _write_record(self.folder, {**self.record, "files": self._written})
        files.write_bytes(self.url(name), data)


@contextlib.contextmanager
def open_stage(
    experiment: Experiment,
    name: str,
    fingerprint: Mapping[str, object],
    result: str,
    *,
    fresh: bool = False,
    on_change: Literal["refuse", "redo"] = "refuse",
    faults: Callable[[], list[Fault]] | None = None,
    reads: Sequence[str] = (),
    decodes: bool = False,
) -> Generator[Stage]:
    """Open a stage for work, or find it done.

    Args:
        experiment: its configuration.
        name: of the stage, and of its folder within the experiment's.
        fingerprint: what decides the stage's result: configuration, and hashes of what it is made from.
        result: the file, within the stage's folder, whose presence means that the stage is finished.
        fresh: delete what is there and start over.
        on_change: what to do with a stage of another fingerprint: keep it safe, or make it again (cheap results).
        faults: what is wrong with a finished stage by its own record: these files are set aside, and the stage is not
            done. By default, what shows in the result file itself, and in the files that `Stage.write` has written.
        reads: files outside of the experiment that each node must reach, some of each kind.
        decodes: whether its images are decoded by Ray tasks, on `cluster.decode_nodes`.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a stage of another fingerprint; or the Ray cluster
            is too small for the work, or one of its nodes cannot reach the files. Nothing is deleted then.
    """
    # MLflow takes 1.5 s of a core to import: only commands open stages, and their actors do without it.
    from cluster.tracking.runs import known_run, start_run
    from cluster.tracking.store import open_client

    folder = files.join(experiment.folder, name)
    fingerprint = _public(fingerprint)
    try:
        files.check_writable(experiment.folder)
    except UserError as error:
        raise UserError(f"root is {experiment.root!r}: {error}") from error
    with locked(folder):
        record, outdated = None, fresh
        if not fresh:
            try:
                record = read_stage(folder, name)
            except DamagedError as error:
                if on_change == "refuse":
                    raise UserError(f"{error}: {_anew(name)}") from error
                print(f"{name}: {error.url!r} {error.reason}: made again", flush=True)
                outdated = True
        if record is not None and (changed := changed_fields(record["fingerprint"], fingerprint)):
            if on_change == "refuse":
                raise UserError(_refused(folder, name, changed))
            record, outdated = None, True
        elif record is None and not outdated and files.exists(folder) and files.listing(folder):
            raise UserError(
                f"{folder!r} holds files but no {RECORD}, so it was not made here: move them away, choose another "
                f"--name, or delete them with {_anew(name)}"
            )
        complete = record is not None and files.exists(files.join(folder, result))
        look = faults or partial(_faults, folder, result, record or {})
        wrong = look() if complete else []
        if record is not None and complete and not wrong:
            print(f"{name}: already done in {folder}", flush=True)
            yield Stage(experiment, name, known_run(experiment, name, record["run"]), True, result, record)
            return
        open_client(experiment.tracking.resolve(experiment.root), experiment.tracking.patience)  # soonest refused
        if experiment.cluster.in_process:
            experiment.cluster.check_device()
        else:
            connect_ray(experiment.cluster.of_work(decodes=decodes))
            if experiment.cluster.joined:
                check_access([experiment.folder, *reads])
        run = start_run(experiment, name, record["run"] if record else None)
        with run.until_end():
            if outdated:  # only now, when nothing else can refuse the start
                files.remove(folder)
            started = {"stage": name, "run": run.run_id, "fingerprint": fingerprint}
            if record is None or record["run"] != run.run_id:
                _write_record(folder, started)
            for url, reason in wrong:
                aside = f", and is set aside as {set_aside(url)!r}" if files.exists(url) else ""
                print(f"{name}: {url!r} {reason}{aside}; it is made again", flush=True)
            yield Stage(experiment, name, run, False, result, started)


def end_killed(experiment: Experiment, name: str) -> None:
    """Mark the run of a stage killed, where the process that worked on it was ended before it could."""
    from cluster.tracking.runs import find_run, known_run

    with contextlib.suppress(UserError):  # nothing is worth waiting for by who was stopped
        record = read_stage(files.join(experiment.folder, name), name)
        found = find_run(experiment.tracking.resolve(experiment.root), record["run"], 0.0) if record else None
        if record and found is not None and found.info.status == "RUNNING":
            known_run(experiment, name, record["run"]).end("KILLED")


def read_stage(folder: str, name: str) -> dict[str, Any] | None:
    """The record of a stage in its folder: its run and its fingerprint; None where there is none.

    A damaged one is named, set aside and written again from its copy.

    Raises:
        DamagedError: and the copy is missing or damaged, too.
    """
    url, copy = files.join(folder, RECORD), files.join(folder, _COPY)
    if not files.exists(url):
        return _of_stage(copy, name) if files.exists(copy) else None
    try:
        return _of_stage(url, name)
    except DamagedError as error:
        if not files.exists(copy):
            raise
        record = _of_stage(copy, name)
        print(f"{error.url!r} {error.reason}; set aside as {set_aside(url)!r}, and written again", flush=True)
        write_record(url, record)
        return record


def _of_stage(url: str, name: str) -> dict[str, Any]:
    record = read_record(url)
    if (found := record.get("stage", name)) != name:  # early versions did not say it
        raise DamagedError(url, f"is the record of {found!r}: it was replaced")
    return record


def _write_record(folder: str, record: Mapping[str, object]) -> None:
    """Write the record of a stage, and its copy."""
    for file in (RECORD, _COPY):
        write_record(files.join(folder, file), record)


def _faults(folder: str, result: str, record: Mapping[str, object]) -> list[Fault]:
    """What is wrong with the files that a record knows, all of which are read; and with a result that is JSON."""
    found = named_faults(folder, record, RECORD)
    if result.endswith(".json") and not found:
        url = files.join(folder, result)
        try:
            read_record(url)
        except DamagedError as error:
            found.append(Fault(error.url, error.reason))
    return found


def faulty(stage: str, folder: str, faults: Sequence[Fault]) -> UserError:
    """The error that names every fault of a finished stage."""
    listed = [f"  {url.removeprefix(folder).lstrip('/')} {reason}" for url, reason in faults]
    remedy = f"bring these files back, or have them made again: pipelines/{COMMANDS[stage]} --mend"
    return UserError("\n".join([f"{len(faults)} faults in {folder!r}:", *listed, remedy]))


def _public(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """A fingerprint as it will be read back, lists for tuples, without the signatures of links, new each time."""

    def public(value: object) -> object:
        return without_secrets(without_query(value)) if isinstance(value, str) else value

    return {name: public(value) for name, value in json.loads(json.dumps(fingerprint)).items()}


def _anew(name: str) -> str:
    """The one command that makes a stage again."""
    stage = name.split("/")[0]
    return f"pipelines/{COMMANDS.get(stage, stage)} --fresh"


def changed_fields(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs between two fingerprints of a stage, a line each: "  field: then -> now"."""
    before, now = BEFORE | _public(before), BEFORE | _public(now)
    fields = sorted(before.keys() | now.keys())
    return [f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in fields if before.get(key) != now.get(key)]


def _refused(folder: str, name: str, changed: Sequence[str]) -> str:
    return "\n".join(
        [
            f"{folder!r} was made with other settings or from other inputs (then -> now):",
            *changed,
            f"set them back to go on, choose another --name, or make the stage anew: {_anew(name)}",
        ]
    )


@contextlib.contextmanager
def locked(folder: str) -> Generator[None]:
    """Hold the lock of a stage or a sweep; the operating system lets go of it when this process ends, however it ends.

    Object stores have no locks: there it is a lease, which runs out.

    Raises:
        UserError: somebody else holds it, or has taken the lease over, as this process was not heard of for its time.
    """
    if not files.is_local(folder):
        with _leased(folder):
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


@contextlib.contextmanager
def _leased(folder: str) -> Generator[None]:
    lease = Lease(f"{folder}.lease")

    def look() -> UserError | None:
        if (owner := lease.beat()) is None:
            return None
        return UserError(
            f"{folder!r} was taken over by {owner}, as nothing was heard of this process for {BEAT_S * BEATS:g} s: "
            "leave it to that one, or stop that one and run the same command again, which goes on where it was"
        )

    try:
        if (owner := lease.take()) is not None:
            raise UserError(f"{folder!r} is in use by {owner}: wait for it, stop it, or choose another --name")
        with ended_by(look, BEAT_S):
            yield
    finally:
        lease.release()
