"""MLflow: one parent run per experiment, one child per stage; the model registry."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from PIL.Image import Image

import bld_core
from bld_core import files
from bld_core.checkpoint import CONFIG, WEIGHTS
from bld_core.generator import AUTOENCODER, PRIOR

if TYPE_CHECKING:
    from cluster.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow.

    Args:
        uri: tracking server, for example http://mlflow:5000; empty keeps a SQLite file, mlflow.db, in `root`, which is
            enough for one machine. Credentials belong in the MLFLOW_TRACKING_* variables, never here.
        experiment: MLflow experiment that holds the runs; empty takes the name of this experiment.
        model: name in the model registry; empty takes the name of this experiment.
        alias: registry alias that `register.py` moves to the version that it makes.
    """

    uri: str = ""
    experiment: str = ""
    model: str = ""
    alias: str = "latest-trained"

    def resolve(self, root: str) -> str:
        """The tracking URI for an experiment root.

        Raises:
            ValueError: no server for a root on object storage.
        """
        if self.uri:
            return self.uri
        if not files.is_local(root):
            raise ValueError(
                f"root {root!r} is not a local folder, and SQLite needs one: set tracking.uri to an MLflow server"
            )
        return f"sqlite:///{files.absolute(root)}/mlflow.db"


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
        return MlflowClient(self.uri)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log figures of a step."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(name, float(v), now, step) for name, v in values.items()])

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
        for name, value in values.items():
            self.client.set_tag(self.run_id, name, value)

    def end(self, succeeded: bool) -> None:
        """Mark the run finished or failed; a failed run is reopened when its stage resumes."""
        status = RunStatus.to_string(RunStatus.FINISHED if succeeded else RunStatus.FAILED)
        self.client.set_terminated(self.run_id, status)


def git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BLD_GIT_COMMIT", "unknown")
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def start_run(experiment: Experiment, stage: str, run_id: str | None) -> Run:
    """The MLflow run of a stage: the recorded one, reopened, or a new child of the experiment's parent run.

    Args:
        experiment: names the MLflow experiment, and is logged as its parameters.
        stage: name of the child run.
        run_id: of an earlier start of this stage, or None. A run that was deleted is replaced by a new one.
    """
    uri = experiment.tracking.resolve(experiment.root)
    client = MlflowClient(uri)
    if run_id is not None:
        try:
            alive = client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            alive = False  # another tracking server than before
        if alive:
            client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            return Run(uri, run_id)
    parent = _parent_run(client, experiment)
    tags = {"mlflow.runName": stage, "mlflow.parentRunId": parent, "mlflow.source.git.commit": git_commit()}
    run = client.create_run(_mlflow_experiment(client, experiment), tags=tags)
    parameters = [Param(name, value[:6000]) for name, value in experiment.parameters().items()]
    client.log_batch(run.info.run_id, params=parameters)
    return Run(uri, run.info.run_id)


def _mlflow_experiment(client: MlflowClient, experiment: Experiment) -> str:
    name = experiment.tracking.experiment or experiment.name
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server keeps artifacts where it was told to; beside a SQLite file we say where.
    database = experiment.tracking.resolve(experiment.root)
    beside = database.removeprefix("sqlite:///").rpartition("/")[0]
    location = files.join(beside, "mlflow-artifacts") if database.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=location)


def _parent_run(client: MlflowClient, experiment: Experiment) -> str:
    """The run that the stages of one experiment folder hang from."""
    mlflow_experiment = _mlflow_experiment(client, experiment)
    quote = '"' if "'" in experiment.folder else "'"  # MLflow's filters have no escapes
    query = f"tags.`bld.folder` = {quote}{experiment.folder}{quote}"
    found = client.search_runs([mlflow_experiment], query, max_results=1)
    if found:
        return found[0].info.run_id
    tags = {
        "mlflow.runName": experiment.name,
        "bld.folder": experiment.folder,
        "mlflow.source.git.commit": git_commit(),
    }
    run = client.create_run(mlflow_experiment, tags=tags)
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def register(experiment: Experiment) -> tuple[str, str]:
    """Register autoencoder and prior as one version of a model, under an alias.

    The version's artifacts are a folder that `bld_core.load` opens. Running it again for the same pair adds nothing.

    Args:
        experiment: finished, both stages.

    Returns:
        (model name, version).

    Raises:
        FileNotFoundError: a stage is not finished.
        ValueError: prior and autoencoder do not belong together.
    """
    pair = bld_core.load(experiment.folder)
    if pair.prior is None:
        raise FileNotFoundError(f"{experiment.folder!r} has no finished prior: run stage2_prior.py first")
    name = experiment.tracking.model or experiment.name
    client = MlflowClient(experiment.tracking.resolve(experiment.root))
    hashes = {"autoencoder_hash": pair.autoencoder.config["hash"], "prior_hash": pair.prior.config["hash"]}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if {key: version.tags.get(key) for key in hashes} == hashes:
            client.set_registered_model_alias(name, experiment.tracking.alias, version.version)
            return name, str(version.version)
    run_id = pair.prior.config["run"]
    for part in (AUTOENCODER, PRIOR):
        for file in (WEIGHTS, CONFIG):
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder, file)
                local.write_bytes(files.read_bytes(files.join(experiment.folder, part, file)))
                client.log_artifact(run_id, str(local), f"model/{part}")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(name, source, run_id, tags=hashes)
    client.set_registered_model_alias(name, experiment.tracking.alias, version.version)
    return name, str(version.version)


def fetch_model(uri: str, name: str, alias: str, folder: str) -> str:
    """Download the version of a registered model that an alias names; returns a folder for `bld_core.load`."""
    client = MlflowClient(uri)
    version = client.get_model_version_by_alias(name, alias)
    assert version.source is not None, "every version was made with a source"
    return mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=folder, tracking_uri=uri)
