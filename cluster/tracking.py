"""MLflow: one parent run per experiment, one child per stage."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus, RunTag
from mlflow.entities import Run as RecordedRun
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from PIL.Image import Image
from sqlalchemy.exc import SQLAlchemyError

from bld_core.errors import UserError
from bld_core.storage import files
from cluster.lineage import COMMIT, command_line, git_commit
from cluster.secrets import without_secrets

if TYPE_CHECKING:
    from cluster.config.experiment import Experiment

STARTS = "bld.starts"
"""Tag of a run: a line for each start of it, with the time, the commit and the command."""
_LONGEST_TAG = 8000  # characters that MLflow keeps

# MLflow sends a request again after 0, 2, 4, ... 64, 120, 120, 120 seconds: a server that is back within 8 minutes has
# every point, and each once, for what makes it a point is in the request. Training waits meanwhile.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "1.0",
}


def open_client(uri: str) -> MlflowClient:
    """A client of a tracking server that outlasts a server which is away for some minutes; also of its registry.

    Raises:
        UserError: a database that cannot be opened. A server is asked for nothing yet.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    for library in ("mlflow", "alembic"):  # making or renewing a database is told step by step at INFO
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, OSError, ModuleNotFoundError) as error:
        raise _refusal(uri, error) from error


@contextlib.contextmanager
def plain_errors(uri: str) -> Generator[None]:
    """What MLflow refuses, or cannot do because its server stays away, is a UserError that says where, why, what now.

    Args:
        uri: tracking URI.
    """
    try:
        yield
    except MlflowException as error:
        raise _refusal(uri, error) from error


def _refusal(uri: str, error: Exception) -> UserError:
    return UserError(
        f"MLflow at {without_secrets(uri)} refused or was away: {without_secrets(str(error))}; check the settings of "
        "`tracking`, that the server or database is there, and the variables MLFLOW_TRACKING_*, which hold credentials"
    )


def quoted(text: str) -> str:
    """A text in one of MLflow's filters, which have no escapes: none can hold both kinds of quotes."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


@dataclass(frozen=True)
class Run:
    """One MLflow run, written by one process at a time.

    Attributes:
        uri: tracking URI.
        run_id: of an existing run.
    """

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client; MLflow shares the connections behind it."""
        return open_client(self.uri)

    @cached_property
    def _reached(self) -> dict[str, int]:
        """The last step of each figure that an earlier start of this run has logged."""
        return {metric.key: metric.step for metric in self.client.get_run(self.run_id).data.to_proto().metrics}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log figures of a step.

        Steps between the last checkpoint and an interruption are taken twice. Their figures are logged once: those of
        the start before stay.
        """
        now = int(time.time() * 1000)
        new = [Metric(name, float(v), now, step) for name, v in values.items() if step > self._reached.get(name, -1)]
        if new:
            self.client.log_batch(self.run_id, new)

    def picture(self, image: Image, name: str) -> None:
        """Log a picture under an artifact path such as reconstructions/step-000500.png."""
        self.client.log_image(self.run_id, image, artifact_file=name)

    def text(self, text: str, name: str) -> None:
        """Log a text under an artifact path."""
        self.client.log_text(self.run_id, text, artifact_file=name)

    def artifacts(self, folder: str, path: str) -> None:
        """Log a local folder of files."""
        self.client.log_artifacts(self.run_id, folder, path)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def end(self, succeeded: bool) -> None:
        """Mark the run finished or failed; a failed run is reopened when its stage resumes."""
        status = RunStatus.to_string(RunStatus.FINISHED if succeeded else RunStatus.FAILED)
        self.client.set_terminated(self.run_id, status)


class SystemLoad:
    """How busy this machine is: MLflow's own monitors and names, without their thread and their clock."""

    def __init__(self) -> None:
        self._monitors: list[CPUMonitor | DiskMonitor | NetworkMonitor | GPUMonitor] = [
            CPUMonitor(),
            DiskMonitor(),
            NetworkMonitor(),
        ]
        with contextlib.suppress(RuntimeError):  # no GPU
            self._monitors.append(GPUMonitor())
        self.metrics()  # the use of the CPU is a mean since the call before

    def metrics(self) -> dict[str, float]:
        """Figures named system/...: CPU since the call before, network since the object was made, the rest now."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            named: dict[str, Any] = monitor.aggregate_metrics()
            found |= {f"system/{name}": value for name, value in named.items()}
        return found


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
        UserError: MLflow refuses it, or is away for longer than `open_client` waits; or its experiment was deleted.
    """
    uri = experiment.tracking.resolve(experiment.root)
    with plain_errors(uri):
        return _start_run(experiment, stage, uri, run_id)


def _start_run(experiment: Experiment, stage: str, uri: str, run_id: str | None) -> Run:
    client, commit = open_client(uri), git_commit()
    before = find_run(uri, run_id) if run_id is not None else None
    if before is not None:
        run = Run(uri, before.info.run_id)
        client.update_run(run.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        run.tags({STARTS: _starts(before.data.tags.get(STARTS, ""), commit)})
        return run
    tags = {
        "mlflow.runName": stage,
        "mlflow.parentRunId": _parent_run(client, experiment),
        COMMIT: commit,
        STARTS: _starts("", commit),
    }
    run = client.create_run(_mlflow_experiment(client, experiment), tags=tags)
    parameters = [Param(name, without_secrets(value)[:6000]) for name, value in experiment.parameters().items()]
    client.log_batch(run.info.run_id, params=parameters)
    return Run(uri, run.info.run_id)


def find_run(uri: str, run_id: str) -> RecordedRun | None:
    """A run as MLflow knows it, or None: it was deleted, or belongs to another tracking server."""
    with plain_errors(uri):
        try:
            found = open_client(uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    return found if found.info.lifecycle_stage == LifecycleStage.ACTIVE else None


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
    database = experiment.tracking.resolve(experiment.root)
    beside = database.removeprefix("sqlite:///").rpartition("/")[0]
    location = files.join(beside, "mlflow-artifacts") if database.startswith("sqlite:") else None
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _mlflow_experiment(client, experiment)  # another start was the first


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
