"""MLflow's store: made once by many, asked once, found again under any name."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.tracking import TrackingConfig
from cluster.tracking.runs import Run, start_run
from cluster.tracking.store import StoreError, database_file, open_client
from tests.conftest import small_experiment
from tests.servers import free_port

USE = "import sys; from cluster.tracking.store import open_client; print(open_client(sys.argv[1]).search_runs(['0']))"


@pytest.mark.long
def test_many_first_uses_of_one_new_database(tmp_path: Path) -> None:
    """Without a lock, some of them meet half of MLflow's migrations: "duplicate column name: step"."""
    words = [sys.executable, "-c", USE, f"sqlite:///{tmp_path}/new/mlflow.db"]
    users = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    assert [user.communicate()[0] for user in users] == ["[]\n"] * 4


@pytest.mark.long
def test_a_database_that_finds_no_space_is_one_message_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    uri, before = f"sqlite:///{tmp_path}/mlflow.db", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # some of its tables fit
    try:
        with pytest.raises(StoreError, match=r"^MLflow (cannot write to its database|at) sqlite:.*(disk|full)"):
            open_client(uri)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
    assert open_client(uri).search_runs(["0"]) == []


@pytest.mark.parametrize("name", ["a b", "100%", "a%20b", "a?b=c", "a#b", "it's [1]", "?%#"])
def test_the_database_is_in_the_root_whatever_its_name(name: str, tmp_path: Path, made_database: bytes) -> None:
    root = tmp_path / name
    root.mkdir()
    (root / "mlflow.db").write_bytes(made_database)
    experiment = small_experiment(root, {"train": "t", "validation": "v"})
    assert database_file(experiment.tracking.resolve(experiment.root)) == root / "mlflow.db"
    run = start_run(experiment, "prior", None)
    run.text("hello", "greeting.txt")
    variant = experiment.variant("sweep", "trial")  # whose tracking URI is that of this one, as a setting
    again = Run(variant.tracking.resolve(variant.root), run.run_id)
    [file] = again.client.list_artifacts(run.run_id)
    assert file.path == "greeting.txt"
    assert len(list(root.glob("mlflow-artifacts/*/artifacts/greeting.txt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def no_mlflow(tmp_path: Path) -> Iterator[str]:
    """A server, and not MLflow's."""
    words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port := str(free_port())]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.kill()


def test_a_store_that_never_answered_is_asked_once(tmp_path: Path, no_mlflow: str) -> None:
    (tmp_path / "no.db").write_text("no database" * 100)
    for uri in (
        f"http://127.0.0.1:{free_port()}",
        no_mlflow,
        "http://no.such.host.example:5000",
        f"postgresql://127.0.0.1:{free_port()}/runs",
        f"sqlite:///{tmp_path}/no.db",
        f"sqlite+none:///{tmp_path}/none.db",
    ):
        check_refused(tmp_path, uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30", "later requests have longer"


@pytest.mark.long
def test_a_server_that_says_nothing_is_waited_for_for_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        check_refused(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - began < 30


def check_refused(root: Path, uri: str) -> None:
    experiment = replace(small_experiment(root, {"train": "t", "validation": "v"}), tracking=TrackingConfig(uri=uri))
    with pytest.raises(ValueError, match=re.escape(f"MLflow at {uri} refused or was away: ")):
        start_run(experiment, "prior", None)
