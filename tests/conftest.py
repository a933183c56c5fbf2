"""Fixtures of a process: one Ray cluster, one S3 server, one MLflow server, one small finished experiment.

Two processes share the tests, one core each. What needs a cluster comes first: some files in one of them, the others in
the other, each with a cluster of its own. Then both take what is left, test by test.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray
import torch
from torch import nn

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import ImageConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.latents.writer import LatentConfig
from bld_core.prior.transformer import Prior, PriorConfig
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, PRIOR
from bld_core.training.checkpoint import save_model
from bld_core.training.loop import TrainingConfig
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents
from cluster.data.shards import ShardConfig, make_shards
from cluster.evaluation.config import EvaluationConfig
from cluster.runtime import ClusterConfig, connect_ray
from cluster.sweep.config import SweepConfig
from cluster.training.train import train_autoencoder, train_prior
from tests.servers import MlflowServer, S3Server

STORAGE_SECONDS = 25  # Ray's workers have it from the session's environment

torch.set_num_threads(1)
# Else Ray's workers wait whenever the other process's tests compute: it gives them what others leave.
os.environ.setdefault("RAY_worker_niceness", "0")


_FIRST_CLUSTER = {"test_evaluate.py", "test_commands.py"}  # half of the time that tests on a cluster take


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "ray_session" in item.fixturenames:
            group = "first" if item.path.name in _FIRST_CLUSTER else "second"
            item.add_marker(pytest.mark.xdist_group(f"{group} cluster"))
        elif isinstance(item, pytest.Function) and "mlflow_server" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("MLflow server"))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as it is in a terminal: a job in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of the demo digits: brace patterns of both splits."""
    output = str(tmp_path_factory.mktemp("data") / "digits")
    return make_shards(ShardConfig(output=output, images_per_shard=405)).patterns


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where remote latents are kept, here and in every process that is started from here."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BLD_CACHE"] = str(folder)
    return folder


def small_training(steps: int, **fields: object) -> TrainingConfig:
    settings: dict[str, object] = {
        "steps": steps,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "warmup": 2,
        "ema_decay": 0.9,
        "log_every": 1,
        "evaluate_every": 100,
        "checkpoint_every": 100,
    }
    return TrainingConfig(**(settings | fields))  # pyright: ignore[reportArgumentType]


def small_experiment(root: Path, digits: dict[str, str], name: str = "small") -> Experiment:
    """An experiment of which every stage takes seconds."""
    return Experiment(
        name=name,
        root=str(root),
        data=ImageConfig(
            train=digits["train"], validation=digits["validation"], image_size=32, channels=1, extensions=["png"]
        ),
        autoencoder=AutoencoderConfig(bits=8, channels=4, multipliers=[1, 2, 2, 2], blocks=1, attention=[]),
        autoencoder_training=small_training(6),
        latents=LatentConfig(draws=1),
        prior=PriorConfig(layers=1, width=32, heads=2, classes=10),
        prior_training=small_training(20, ema_decay=[0.9, 0.3]),
        sampling=SamplingConfig(steps=4, guidance=1.0),
        evaluation=EvaluationConfig(samples=40, batch_size=20, class_accuracy=True),
        sweep=SweepConfig(steps=4, concurrent=2),
        cluster=ClusterConfig(workers=0, cpus_per_worker=0.25, decode_tasks=0),
    )


@pytest.fixture(scope="session")
def ray_session(s3: str) -> Iterator[None]:
    """The one local Ray cluster, which the first work with workers starts (with the S3 settings)."""
    os.environ.pop("RAY_ADDRESS", None)
    # A look at a training more often than every other second, and no look-out for a cloud that takes nodes away.
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(ray_session: None) -> None:
    """The same, started."""
    connect_ray(ClusterConfig(cpus_per_worker=0.25))


@pytest.fixture(scope="session")
def encoded(ray_session: None, digits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A small experiment whose autoencoder is trained and whose images are encoded."""
    experiment = small_experiment(tmp_path_factory.mktemp("runs"), digits)
    train_autoencoder(experiment)
    encode_latents(experiment)
    return experiment


@pytest.fixture(scope="session")
def finished(encoded: Experiment) -> Experiment:
    """The small experiment with its prior."""
    train_prior(encoded)
    return encoded


def copy_of(experiment: Experiment, root: Path, *stages: str) -> Path:
    """Copy some stages of an experiment, to spoil or redo them; returns the new root."""
    for stage in stages:
        shutil.copytree(Path(experiment.folder, stage), root / experiment.name / stage)
    return root


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A file of Inception weights, freshly initialised, and its sha256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def keep(network: nn.Module, state: object) -> None:
        del network, state

    with pytest.MonkeyPatch.context() as patch:  # its constructor wants the file that is yet to be made
        patch.setattr(torch, "load", lambda *_, **__: {})  # pyright: ignore[reportUnknownLambdaType]
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", keep)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("made", ["2048"], feature_extractor_weights_path="none")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on a free loopback port, with one bucket: its place and keys are in the environment."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    server = S3Server(folder)
    settings = server.settings | {"BLD_STORAGE_SECONDS": str(STORAGE_SECONDS)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def s3(s3_server: S3Server) -> str:
    """The URL of the server's bucket."""
    return "s3://bucket"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """The one MLflow server."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


def random_pair(
    root: Path, digits: dict[str, str], uri: str, *, autoencoder: int = 0, prior: int = 0, latents: str = "1"
) -> Experiment:
    """An experiment whose networks have random weights, by their seeds: finished without training; of groups."""
    experiment = small_experiment(root, digits, "pair")
    joint = replace(experiment.prior, group=8)
    experiment = replace(experiment, prior=joint, tracking=TrackingConfig(uri=uri))
    h, w, c = experiment.code_shape
    parts: list[tuple[str, int, nn.Module, dict[str, object]]] = [
        (
            AUTOENCODER,
            autoencoder,
            make_autoencoder(experiment.autoencoder, 1),
            {
                "autoencoder": asdict(experiment.autoencoder),
                "code_shape": (h, w, c),
                "image_size": 32,
                "channels": 1,
                "data_hash": "d" * 64,
            },
        ),
        (
            PRIOR,
            prior,
            Prior(experiment.prior, h * w, c),
            {
                "prior": asdict(experiment.prior),
                "diffusion": asdict(experiment.diffusion),
                "sampling": asdict(experiment.sampling),
                "latents_hash": latents * 64,
                "run": "none",
            },
        ),
    ]
    digest = ""
    for place, seed, network, config in parts:
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        extra = {} if place == AUTOENCODER else {"autoencoder_hash": digest}
        digest = save_model(files.join(experiment.folder, place), network.state_dict(), config | extra)
    return experiment


def report_of(experiment: Experiment, report: dict[str, object]) -> Experiment:
    """The experiment with a report of its evaluation, which never was."""
    configs = {f"{part}_hash": f"{experiment.folder}/{part}/final/config.json" for part in ("autoencoder", "prior")}
    hashes = {part: files.read_json(config)["hash"] for part, config in configs.items() if files.exists(config)}
    files.write_json(f"{experiment.folder}/evaluation/report.json", hashes | report)
    return experiment


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
