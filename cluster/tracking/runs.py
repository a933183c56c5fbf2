"""MLflow: one parent run per experiment, one child per stage."""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import PIL.Image
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus, RunTag
from mlflow.entities import Run as RecordedRun
from mlflow.exceptions import MlflowException
from PIL.Image import Image

from bld_core.data.pictures import png
from bld_core.errors import UserError
from bld_core.storage import files
from cluster.lineage import COMMIT, command_line, git_commit
from cluster.secrets import without_secrets
from cluster.tracking.address import RunAddress
from cluster.tracking.outbox import Note, Outbox
from cluster.tracking.store import StoreError, database_file, http_settings, open_client, patiently, refuse

if TYPE_CHECKING:
    from cluster.config.experiment import Experiment

STARTS = "bld.starts"
"""Tag of a run: a line for each start of it, with the time, the commit and the command."""
_LONGEST_TAG = 8000  # characters that MLflow keeps


def quoted(text: str) -> str:
    """A text in one of MLflow's filters, which have no escapes: none can hold both kinds of quotes."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


Ending = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run(RunAddress):
    """One MLflow run, written by one process at a time.

    What the store cannot take now waits in a folder and is told later, in order: by the next call, at the end, or when
    the same command runs again. A picture is kept as PNG in base64.
    """

    def __reduce__(self) -> tuple[type[RunAddress], tuple[str, str, str, float]]:
        return RunAddress, (self.uri, self.run_id, self.waiting, self.patience)  # another process opens it for itself

    def open(self) -> Run:
        """Itself."""
        return self

    @property
    def client(self) -> MlflowClient:
        """A client; MLflow shares the connections behind it."""
        return open_client(self.uri, self.patience)

    @cached_property
    def _reached(self) -> dict[str, int]:
        """The last step of each metric that was logged, at first by an earlier start of this run."""
        return {metric.key: metric.step for metric in self.client.get_run(self.run_id).data.to_proto().metrics}

    @cached_property
    def _outbox(self) -> Outbox:
        return Outbox(self.waiting, self._tell, without_secrets(self.uri))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step.

        Steps between the last checkpoint and an interruption are taken twice. Their metrics are logged once: those of
        the start before stay.
        """
        self._put({"metrics": {name: float(value) for name, value in values.items()}, "step": step})

    def picture(self, image: Image, name: str) -> None:
        """Log a picture under an artifact path such as reconstructions/step-000500.png."""
        self._put({"picture": base64.b64encode(png(image)).decode(), "name": name})

    def text(self, text: str, name: str) -> None:
        """Log a text under an artifact path."""
        self._put({"text": text, "name": name})

    def artifacts(self, folder: str, path: str) -> None:
        """Log a local folder of files, which are not kept where the store is away: it is waited for."""

        def log() -> None:
            with http_settings(MLFLOW_HTTP_REQUEST_TIMEOUT="600"):  # the server stores them before it answers
                self.client.log_artifacts(self.run_id, folder, path)

        patiently(self.uri, self.patience, log)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._put({"tags": dict(values)})

    def end(self, how: Ending) -> None:
        """Mark the run finished, failed or killed; a run that is not finished is reopened when its stage resumes."""
        patience = self.patience if how == "FINISHED" else 0.0  # who was stopped does not wait
        note: Note = {"end": how, "time": int(time.time() * 1000)}
        if not self.waiting:
            try:
                patiently(self.uri, patience, lambda: self._tell(note))
            except StoreError as error:
                if how == "FINISHED":
                    raise
                print(f"MLflow cannot be told that its run is {how}: {error}")  # beside the error that is under way
            return
        self._outbox.look_again()
        self._outbox.put(note)
        if self._outbox.waits:
            with contextlib.suppress(StoreError):  # said below
                patiently(self.uri, patience, self._send)
        if self._outbox.waits:
            where = without_secrets(self.uri)
            print(f"MLflow at {where} is away: what it is to be told waits in {self.waiting}; run the command again")

    @contextlib.contextmanager
    def until_end(self) -> Generator[None]:
        """End the run as the block ends: finished, failed, or killed, by Ctrl-C or a signal."""
        how: Ending = "KILLED"
        try:
            yield
            how = "FINISHED"
        except Exception:
            how = "FAILED"
            raise
        finally:
            self.end(how)

    def send_waiting(self) -> None:
        """Tell what an earlier start has kept.

        Raises:
            UserError: the store is away still.
        """
        if self.waiting and self._outbox.waits:
            self._send()

    def _send(self) -> None:
        failure = self._outbox.send()
        if failure is not None:
            refuse(self.uri, failure)

    def _put(self, note: Note) -> None:
        note |= {"time": int(time.time() * 1000)}
        if self.waiting:
            self._outbox.put(note)
        else:
            patiently(self.uri, self.patience, lambda: self._tell(note))

    def _tell(self, note: Note) -> None:
        """Tell the store one note; the same one a second time changes nothing."""
        client, run_id = self.client, self.run_id
        match note:
            case {"metrics": values, "step": step, "time": now}:
                reached = self._reached
                new = [Metric(name, value, now, step) for name, value in values.items() if step > reached.get(name, -1)]
                if new:
                    client.log_batch(run_id, new)
                reached |= {metric.key: step for metric in new}
            case {"picture": data, "name": name}:
                client.log_image(run_id, PIL.Image.open(io.BytesIO(base64.b64decode(data))), artifact_file=name)
            case {"text": text, "name": name}:
                client.log_text(run_id, text, artifact_file=name)
            case {"tags": tags}:
                client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
            case {"end": how, "time": now}:
                client.set_terminated(run_id, how, now)
            case _:
                raise ValueError(f"no note to MLflow: {sorted(note)}")


def _starts(before: str, commit: str) -> str:
    """The tag `STARTS` with a line more: when, from which code, by which command this process works."""
    command = " ".join(command_line(*sys.argv).split())
    now = f"{datetime.now(UTC).isoformat(timespec='seconds')} {commit} {command}"
    lines = [*before.splitlines(), now[:_LONGEST_TAG]]
    while len("\n".join(lines)) > _LONGEST_TAG:
        del lines[0]
    return "\n".join(lines)


def start_run(experiment: Experiment, stage: str, run_id: str | None) -> Run:
    """The MLflow run of a stage: the recorded one, reopened, or a new child of the experiment's parent run.

    Args:
        experiment: names the MLflow experiment, and is logged as its parameters.
        stage: name of the child run.
        run_id: of an earlier start of this stage, or None. A run that was deleted is replaced by a new one.

    Raises:
        UserError: MLflow refuses it, has never answered, or is away for longer than `tracking.patience`; or its
            experiment was deleted.
    """
    tracking, uri = experiment.tracking, experiment.tracking.resolve(experiment.root)
    waiting = _waiting(experiment, stage)
    client = open_client(uri, tracking.patience)  # asked outside of all patience
    before = find_run(uri, run_id, tracking.patience) if run_id else None
    if before is not None:
        run = Run(uri, before.info.run_id, waiting, tracking.patience)
        patiently(uri, tracking.patience, lambda: _reopen(run, before))
        return run
    run_id = patiently(uri, tracking.patience, lambda: _new_run(client, experiment, stage))
    run = Run(uri, run_id, waiting, tracking.patience)
    parameters = [Param(name, without_secrets(value)[:6000]) for name, value in experiment.parameters().items()]
    try:
        patiently(uri, tracking.patience, lambda: client.log_batch(run.run_id, params=parameters))
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    return run


def known_run(experiment: Experiment, stage: str, run_id: str) -> Run:
    """The run of a stage that is done; what an earlier start has kept is told now, if the store is there."""
    tracking = experiment.tracking
    run = Run(tracking.resolve(experiment.root), run_id, _waiting(experiment, stage), tracking.patience)
    with contextlib.suppress(UserError):  # it waits on, and the stage is done all the same
        run.send_waiting()
    return run


def trial_run(trial: Experiment, sweep: str, values: Mapping[str, object]) -> Run:
    """The MLflow run of a sweep's trial, a child of the sweep's run; the runs of the trial's stages hang from it.

    Args:
        trial: its configuration.
        sweep: id of the sweep's run.
        values: the fields in which its trials differ, the parameters of this run.

    Raises:
        UserError: as `start_run`.
    """
    tracking, uri = trial.tracking, trial.tracking.resolve(trial.root)
    client = open_client(uri, tracking.patience)
    run_id = patiently(uri, tracking.patience, lambda: _parent_run(client, trial))
    parameters = [Param(name, str(value)[:6000]) for name, value in values.items()]
    tags = [RunTag("mlflow.parentRunId", sweep)]
    patiently(uri, tracking.patience, lambda: client.log_batch(run_id, params=parameters, tags=tags))
    return Run(uri, run_id, _waiting(trial), tracking.patience)


def _waiting(experiment: Experiment, stage: str = "") -> str:
    """Where a stage keeps what its run is to be told; "" where it rather stops than goes on untold."""
    parts = [stage, "mlflow-waiting"] if stage else ["mlflow-waiting"]
    return files.join(experiment.folder, *parts) if experiment.tracking.when_away == "keep" else ""


def _reopen(run: Run, before: RecordedRun) -> None:
    run.send_waiting()  # how the start before ended, among it
    run.client.update_run(run.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
    run.tags({STARTS: _starts(before.data.tags.get(STARTS, ""), git_commit())})


def _new_run(client: MlflowClient, experiment: Experiment, stage: str) -> str:
    commit = git_commit()
    tags = {
        "mlflow.runName": stage,
        "mlflow.parentRunId": _parent_run(client, experiment),
        COMMIT: commit,
        STARTS: _starts("", commit),
    }
    return client.create_run(_mlflow_experiment(client, experiment), tags=tags).info.run_id


def find_run(uri: str, run_id: str, patience: float) -> RecordedRun | None:
    """A run as MLflow knows it, or None: it was deleted, or belongs to another tracking server."""
    client = open_client(uri, patience)

    def find() -> RecordedRun | None:
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    found = patiently(uri, patience, find)
    return found if found is not None and found.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def _mlflow_experiment(client: MlflowClient, experiment: Experiment) -> str:
    name = experiment.tracking.experiment or experiment.name
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: restore it by `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, or set tracking.experiment to another name"
        )
    if found is not None:
        return found.experiment_id
    # A server keeps artifacts where it was told to; beside a SQLite file we say where.
    database = database_file(experiment.tracking.resolve(experiment.root))
    location = None if database is None else _as_location(database.absolute().with_name("mlflow-artifacts"))
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _mlflow_experiment(client, experiment)  # another start was the first


def _as_location(folder: Path) -> str:
    """A folder as MLflow takes it, which reads %, ? and # in a path as those of a URL."""
    return folder.as_uri() if any(sign in str(folder) for sign in "%?#") else str(folder)


def _parent_run(client: MlflowClient, experiment: Experiment) -> str:
    """The run that the stages of one experiment folder hang from."""
    mlflow_experiment = _mlflow_experiment(client, experiment)
    folder = without_secrets(experiment.folder)
    found = client.search_runs([mlflow_experiment], f"tags.`bld.folder` = {quoted(folder)}", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {
        "mlflow.runName": experiment.name,
        "bld.folder": folder,
        COMMIT: git_commit(),
    }
    run = client.create_run(mlflow_experiment, tags=tags)
    client.set_terminated(run.info.run_id)
    return run.info.run_id
