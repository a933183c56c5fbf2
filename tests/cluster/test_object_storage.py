"""The whole order of work with everything on a real S3 server: shards, checkpoints, latents, models, the report."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import bld_core
from bld_core.storage import files
from bld_core.storage.patience import StorageError
from bld_core.trained import AUTOENCODER
from bld_core.training.checkpoint import CONFIG, WEIGHTS
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents, verify_latents
from cluster.evaluation.evaluate import evaluate
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import STORAGE_SECONDS, small_training
from tests.servers import S3Server

OUTAGE_S = 10.0


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
    cluster = replace(experiment.cluster, workers=1)
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


@pytest.mark.long
def test_two_encoders_of_one_place_without_locks_end_with_the_same_bytes(
    encoded: Experiment, on_s3: Experiment, s3_server: S3Server
) -> None:
    experiment = with_autoencoder(on_s3, "twice", encoded)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(encode_latents, experiment) for _ in range(2)]:
            done.result()
    assert latent_files(s3_server.folder / "bucket/runs", "twice") == latent_files(Path(encoded.root), "small")
