"""Shards behind signed links: no signature, key or password is ever stored, and a renewed link is the same."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bld_core.latents.reader import open_latents
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents, verify_latents
from cluster.evaluation.evaluate import evaluate
from cluster.report.page import write_report
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import copy_of, small_training

PLANTED = {"signature": "s1gnatureThatIsPlanted", "key": "k3yThatIsPlanted", "password": "passw0rdThatIsPlanted"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, whatever the query."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called there
        pass


@pytest.fixture
def web(digits: dict[str, str]) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(Path(digits["train"]).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def found_in(folder: Path, secret: str) -> list[str]:
    """The files below a folder in whose bytes or names a secret is."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in paths if secret in str(path) or secret.encode() in path.read_bytes()]


def linked(experiment: Experiment, root: Path, web: str, signature: str) -> Experiment:
    query = f"?X-Amz-Credential={PLANTED['key']}%2F2026&X-Amz-Signature={signature}"
    train = "::".join(f"{web}/train-000{i}.tar{query}" for i in (0, 1))
    data = replace(experiment.data, train=train, validation=f"{web}/validation-0000.tar{query}")
    few = {"autoencoder_training": small_training(2), "prior_training": small_training(2)}
    evaluation = replace(experiment.evaluation, samples=20, neighbours=2, export="npz")
    return replace(experiment, root=str(root), data=data, evaluation=evaluation, **few)


@pytest.mark.long
def test_no_signature_and_no_key_is_stored_and_a_renewed_link_is_the_same_shard(
    encoded: Experiment, tmp_path: Path, web: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PLANTED["password"])
    first = linked(encoded, tmp_path, web, PLANTED["signature"])
    train_autoencoder(first)
    folder = Path(encode_latents(first))
    names = ["train/train-0000.parquet", "train/train-0001.parquet", "validation/validation-0000.parquet"]
    assert [file.file for file in open_latents(str(folder)).manifest.files] == names
    assert open_latents(str(folder)).manifest.files[0].source == "train-0000.tar"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    capfd.readouterr()
    renewed = linked(encoded, tmp_path, web, "another" + "&X-Amz-Security-Token=t0ken")
    train_autoencoder(renewed)
    encode_latents(renewed)
    assert capfd.readouterr().out.count("already done") == 2
    (folder / "manifest.json").unlink()
    encode_latents(renewed)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == written
    assert verify_latents(renewed).startswith("verified 3 files")
    train_prior(renewed)
    draw_grid(renewed, GridConfig(rows=1))
    monkeypatch.setattr("sys.argv", ["evaluate.py", f"--data.train={first.data.train}"])  # runs and page say it
    evaluate(renewed)
    assert Path(write_report(renewed)).read_text().count("?X-Amz-Credential=***") >= 2
    session = Path(os.path.realpath("/tmp/ray/session_latest"))
    assert list((session / "logs").iterdir())
    for secret in (*PLANTED.values(), "t0ken"):
        assert found_in(tmp_path, secret) == []
        assert found_in(session / "logs", secret) == []


def test_shards_of_the_same_name_become_files_that_their_folders_tell_apart(
    encoded: Experiment, tmp_path: Path
) -> None:
    source = Path(files.expand(encoded.data.validation)[0])
    for date in (1, 2):
        (tmp_path / f"date={date}").mkdir()
        (tmp_path / f"date={date}" / "0.tar").symlink_to(source)
    root = copy_of(encoded, tmp_path / "runs", "autoencoder")
    data = replace(encoded.data, train=f"{tmp_path}/date=*/0.tar")
    (tmp_path / "empty.tar").touch()
    data = replace(data, train=f"{data.train}::{tmp_path}/empty.tar")
    data = replace(data, max_skipped=0.1)
    latents = open_latents(encode_latents(replace(encoded, root=str(root), data=data)))
    assert [file.file for file in latents.shards] == [
        "train/date=1-0.parquet",
        "train/date=2-0.parquet",
        "train/empty.parquet",
    ]
    assert [file.rows for file in latents.shards][2] == 0
    assert len(latents.read()) == len(latents)
    assert latents.manifest.classes == []
