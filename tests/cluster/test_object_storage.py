"""The whole order of work with everything on a real S3 server: shards, checkpoints, latents, models, the report."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

import bld_core
import bld_core.storage.lease
import cluster.stages
from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.storage.lease import BEATS
from bld_core.storage.patience import StorageError
from bld_core.trained import AUTOENCODER
from bld_core.training.checkpoint import CONFIG, WEIGHTS
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents, verify_latents
from cluster.evaluation.evaluate import evaluate
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.stages import locked
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import STORAGE_SECONDS, small_training
from tests.servers import S3Server

OUTAGE_S = 10.0
BEAT_S = 0.5
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_s3(
    encoded: Experiment,
    s3: str,
    s3_server: S3Server,
    digits: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Experiment:
    """The small experiment with shards and root on the server; MLflow's SQLite file lies elsewhere."""
    folder = Path(digits["train"]).parent
    for file in (*folder.glob("*.tar"), *folder.glob("classes.json")):
        files.write_bytes(f"{s3}/on_s3/{file.name}", file.read_bytes())
    patterns = {split: f"{s3}/on_s3/{Path(pattern).name}" for split, pattern in digits.items()}
    experiment = replace(encoded, data=replace(encoded.data, **patterns))
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db")
    training = small_training(20, checkpoint_every=5)
    cluster = replace(experiment.cluster, workers=1, decode_tasks=1)
    return replace(experiment, root=f"{s3}/runs", tracking=tracking, prior_training=training, cluster=cluster)


def with_autoencoder(experiment: Experiment, name: str, source: Experiment) -> Experiment:
    """The experiment under another name, with a copy of the autoencoder of another one."""
    copy = replace(experiment, name=name)
    for file in (WEIGHTS, CONFIG):
        there, here = (files.join(folder, AUTOENCODER, file) for folder in (source.folder, copy.folder))
        files.write_bytes(here, files.read_bytes(there))
    return copy


@contextlib.contextmanager
def stopped_when(server: S3Server, found: str, seconds: float | None) -> Generator[threading.Event]:
    """Stop the server as soon as files of a pattern are in its folder; start it again after some seconds, or never."""
    stopped, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if any(server.folder.glob(found)):
                server.stop()
                stopped.set()
                if seconds is not None:
                    time.sleep(seconds)
                    server.start()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield stopped
    finally:
        over.set()
        thread.join()


def latent_files(root: Path, name: str) -> dict[str, bytes]:
    """The packed latents and their manifest."""
    folder = root / name / "latents"
    paths = [*sorted(folder.rglob("*.parquet")), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.long
def test_the_whole_order_of_work_goes_on_through_outages_and_leaves_nothing_on_the_disk(
    encoded: Experiment, on_s3: Experiment, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_autoencoder(replace(on_s3, cluster=replace(on_s3.cluster, workers=0)))  # stage 2 has workers of Ray Train
    for stage, found in ((encode_latents, "latents/train/*.parquet"), (train_prior, "prior/checkpoint-*/meta.json")):
        with stopped_when(s3_server, f"bucket/runs/small/{found}", OUTAGE_S) as stopped:
            stage(on_s3)
        assert stopped.is_set(), f"{stage.__name__} was over before the server could be stopped"
    assert latent_files(s3_server.folder / "bucket/runs", "small") == latent_files(Path(encoded.root), "small")
    picture = draw_grid(on_s3, GridConfig(rows=2))
    report = evaluate(on_s3)
    assert picture.startswith("s3://bucket/runs/small/samples/")
    assert report["figures"]["psnr"] > 0
    assert "5 files, 1797 rows" in verify_latents(on_s3)
    there = {path.name for path in (s3_server.folder / "bucket/runs/small").rglob("*")}
    assert there >= {
        "model.safetensors",
        "manifest.json",
        "train-0003.parquet",
        "samples.npz",
        "report.json",
        "grid.png",
    }
    assert bld_core.load(on_s3.folder).sample(2, seed=1).shape == (2, 32, 32, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_server_that_stays_away_is_one_clear_error_and_the_same_command_completes_later(
    encoded: Experiment, on_s3: Experiment, s3_server: S3Server
) -> None:
    experiment = with_autoencoder(on_s3, "later", encoded)
    folder = s3_server.folder / "bucket/runs/later/latents"
    began = time.monotonic()
    with stopped_when(s3_server, "bucket/runs/later/latents/train/*.parquet", None) as stopped:
        with pytest.raises(StorageError, match=r"cannot .*s3://bucket/.*tried \d+ times in \d+ s.*same command again"):
            encode_latents(experiment)
        took = time.monotonic() - began
    assert stopped.is_set()
    assert took > STORAGE_SECONDS
    s3_server.start()
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert finished
    encode_latents(experiment)
    assert latent_files(s3_server.folder / "bucket/runs", "later") == latent_files(Path(encoded.root), "small")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished shard was made again"


@contextlib.contextmanager
def held_elsewhere(folder: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that holds a stage of an object store."""
    script = (
        "import sys, time; import bld_core.storage.lease as lease; lease.BEAT_S = float(sys.argv[2])\n"
        "from cluster.stages import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, folder, str(BEAT_S)], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_a_second_start_is_refused_and_a_killed_one_loses_its_place(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bld_core.storage.lease, "BEAT_S", BEAT_S)
    folder = f"{s3}/leases/small/prior"
    with held_elsewhere(folder) as process:
        refusal = (
            rf"'{folder}' is in use by process {process.pid} on {os.uname().nodename}, since 20\S+ \S+ UTC, "
            r"0:\d\d:\d\d ago: wait for it, stop it, or choose another --name"
        )
        with pytest.raises(UserError, match=refusal), locked(folder):
            pass
    killed = time.monotonic()
    with locked(folder):
        assert time.monotonic() - killed < BEAT_S * BEATS + 5
        there = s3_server.folder / "bucket/leases/small/prior.lease"
        assert json.loads(there.read_text())["process"] == os.getpid()
    assert not there.exists()


def test_who_was_taken_for_dead_ends_with_the_other_ones_name(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    monkeypatch.setattr(cluster.stages, "BEAT_S", 0.1)
    folder = f"{s3}/leases/taken/prior"
    there = s3_server.folder / "bucket/leases/taken/prior.lease"

    def work() -> None:
        with locked(folder):
            there.write_text(json.dumps({"id": "another", "process": 7, "host": "elsewhere", "since": 0}))
            time.sleep(60)

    with pytest.raises(UserError, match=f"'{folder}' was taken over by process 7 on elsewhere, since 1970"):
        work()
    assert there.exists()
