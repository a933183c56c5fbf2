"""Commands that are stopped, that fail, or whose nodes are gone: each ends soon, with its exit code, its run closed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import cluster.training.train as cluster_train
from bld_core.storage import files
from bld_core.training.loop import Batch
from cluster.console import user_errors_answered
from cluster.nodes.watch import check_access
from cluster.runtime import ClusterConfig, connect_ray
from cluster.training.tasks import AutoencoderTask, Evaluation, Worker
from cluster.training.train import train_autoencoder
from tests.conftest import small_experiment, small_training
from tests.servers import Nodes

REPOSITORY = Path(__file__).parents[2]
SOON_S = 30


def work(root: str, digits: dict[str, str], machines: dict[str, object]) -> None:
    """A command of stage 1."""
    small = small_experiment(Path(root), digits)
    training = small_training(10_000, checkpoint_every=3)
    cluster = replace(small.cluster, **{"decode_tasks": 1} | machines)  # pyright: ignore[reportArgumentType]
    with user_errors_answered({"cluster": vars(cluster)}, "this command"):
        train_autoencoder(replace(small, autoencoder_training=training, cluster=cluster))


class Command:
    """`work` in a process of its own; what it says goes to a file."""

    def __init__(self, root: Path, digits: dict[str, str], **machines: object) -> None:
        self.root, self.log = root, root.with_name(f"{root.name}.log")
        call = "import json, sys; from tests.cluster.test_outages import work; work(*json.loads(sys.argv[1]))"
        arguments = json.dumps([str(root), digits, machines])
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", call, arguments],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # a job in the background is told to ignore Ctrl-C, and its children with it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def ends(self, signal_number: int = 0) -> int:
        if signal_number:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(SOON_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def run_status(self) -> str:
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            [[status]] = database.execute("SELECT status FROM runs WHERE name = 'autoencoder'").fetchall()
        return status


class FailingTask(AutoencoderTask):
    """Stage 1 whose evaluation fails in the middle of its data."""

    closed = False

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        try:
            yield from super().batches(step, positions, worker)
        finally:
            FailingTask.closed = True

    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        raise RuntimeError("as it fails")


def test_a_training_that_fails_closes_its_data(
    ray_session: None, digits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of Ray Data that is open at a process's end starts another Ray, and the process never ends."""
    small = small_experiment(tmp_path, digits)
    small = replace(small, cluster=replace(small.cluster, decode_tasks=1))
    monkeypatch.setattr(cluster_train, "AutoencoderTask", FailingTask)
    with pytest.raises(RuntimeError, match="as it fails") as raised:
        train_autoencoder(replace(small, autoencoder_training=small_training(2)))
    assert FailingTask.closed
    assert raised.tb is not None, "which holds all that its frames hold"


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_no_space_for_a_checkpoint_is_one_message_and_the_command_ends(
    workers: int, digits: dict[str, str], disk: Path
) -> None:
    command = Command(disk, digits, workers=workers)
    command.wait_for(" left  loss")
    other = disk / "other"
    with contextlib.suppress(OSError):  # a checkpoint that is under way is there before it
        other.write_bytes(bytes(shutil.disk_usage(disk).free))
    os.truncate(other, other.stat().st_size - (1 << 16))  # some for the database, which is on this disk, too
    assert command.ends() == 2, command.said()
    *_, last = command.said().splitlines()
    assert re.fullmatch(
        rf"error: no space for '{disk}/small/autoencoder/checkpoint-\d+/\w+.safetensors' of [\d,]+ bytes "
        r"\(No space left on device; [\d,]+ bytes are free there\): free some, or choose another folder, then run the "
        "same command again, which goes on where it stopped",
        last,
    ), command.said()
    assert "Traceback" not in command.said()
    assert command.run_status() == "FAILED"


@pytest.mark.long
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_clean(stop: signal.Signals, code: int, digits: dict[str, str], tmp_path: Path) -> None:
    """With Ray Train; trainings in the command's own process are in tests/pipelines/test_stops.py."""
    command = Command(tmp_path, digits, workers=1)
    command.wait_for(" left  loss")
    assert command.ends(stop) == code, command.said()
    *_, last = command.said().splitlines()
    assert last == f"stopped by {stop.name}; this goes on where it was: this command"
    assert "Traceback" not in command.said()
    assert command.run_status() == "KILLED"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.long
def test_a_node_that_does_not_return_is_said_and_not_waited_for_without_end(
    nodes: Nodes, digits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, nodes.environment[name])
    machines: dict[str, object] = {"workers": 2, "cpus_per_worker": 0.75, "decode_tasks": 0}
    machines["address"] = f"127.0.0.1:{nodes.port}"

    def started(**more: object) -> Command:
        nodes.start()
        while True:
            command = Command(tmp_path / "runs", digits, **machines, **more)
            with contextlib.suppress(AssertionError):
                command.wait_for(" left  loss")
                break
            assert "lower cluster.workers" in command.said(), "the node was not there yet, or what else?"
        nodes.kill()
        command.wait_for("waiting: the Ray cluster has 1 of 1.5 CPU cores that the work needs, since ", 20)
        return command

    command = started()
    assert command.ends(signal.SIGINT) == 130, command.said()
    assert command.run_status() == "KILLED"
    command = started(patience=10)
    assert command.ends() == 2, command.said()
    [message] = [line for line in command.said().splitlines() if line.startswith("error: ")]
    assert (
        "cluster.patience is 10 s: bring the nodes back, or lower cluster.workers, and run the same command" in message
    )
    assert command.run_status() == "FAILED"


def look(address: str, urls: list[str], machines: dict[str, Any]) -> None:
    """What each stage does first on a cluster that is there already."""
    with user_errors_answered({}, ""):
        connect_ray(ClusterConfig(address=address, **machines))
        check_access(urls)


def looks(nodes: Nodes, *urls: str, **machines: Any) -> tuple[int, str]:
    """`look` in a process of its own, as soon as the cluster answers: its exit code, and what it says."""
    call = "import json, sys; from tests.cluster.test_outages import look; look(*json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", call, json.dumps([f"127.0.0.1:{nodes.port}", urls, machines])]
    keys = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    while True:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | keys, capture_output=True, text=True, check=False
        )
        if "no Ray cluster answers" not in done.stderr:
            return done.returncode, done.stderr


@pytest.mark.long
def test_what_only_the_command_can_reach_is_said_with_the_names_of_the_variables_that_a_node_lacks(
    s3: str, digits: dict[str, str], tmp_path: Path
) -> None:
    files.write_bytes(f"{s3}/access/a.tar", Path(files.expand(digits["validation"])[0]).read_bytes())
    nodes = Nodes(tmp_path, "AWS_ACCESS_KEY_ID", "AWS_SECRET")
    try:
        assert looks(nodes, str(tmp_path), files.expand(digits["train"])[0], cpus_per_worker=0.5)[0] == 0
        code, error = looks(nodes, str(tmp_path), f"{s3}/access/a.tar", cpus_per_worker=0.5)
        assert code == 2, error
        assert re.search(
            r"error: node \S+ cannot reach what its workers need: cannot look for 's3://bucket/access/a.tar': .*; it "
            r"lacks AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, which are set here: set them where `ray start` runs",
            error,
        ), error
        assert "testsecret" not in error
        session = Path(os.path.realpath("/tmp/ray/session_latest"))
        assert [path for path in session.rglob("*.*") if path.is_file() and b"testsecret" in path.read_bytes()] == []
    finally:
        nodes.end()
