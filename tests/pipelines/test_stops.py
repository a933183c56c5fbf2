"""Every command that works for longer than a moment ends soon when it is told to, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from tests.conftest import copy_of, small_training
from tests.pipelines.test_commands import PIPELINES

SOON_S = 30
TRAINED = ["autoencoder", "latents", "prior"]
LONG: dict[str, tuple[list[str], list[str]]] = {
    "stage1_ae.py": ([], []),
    "encode_latents.py": (["autoencoder"], []),
    "stage2_prior.py": (["autoencoder", "latents"], []),
    "sample.py": (TRAINED, ["--grid.rows", "1000"]),
    "inpaint.py": (TRAINED, ["--inpaint.samples", f"{[*range(100)]}", "--inpaint.completions", "100"]),
    "sweep.py": (["autoencoder", "latents"], ["prior", "--sweep.steps", "10000"]),
    "reference.py": ([], ["--evaluation.classifier", "true", "--study.classifier_steps", "10000"]),
    "study.py": (TRAINED, ["steps", "--study.steps", "[4]", "--study.classifier_steps", "10000"]),
    "evaluate.py": (TRAINED, ["--evaluation.samples", "100000"]),
    "run_all.py": ([], []),
}
"""The stages before each command, and flags that make its work long."""
IN_PROCESS = {"sample.py", "inpaint.py", "reference.py", "study.py", "evaluate.py"}
"""Commands that are tried without Ray; the others with it."""
CTRL_C = {"stage1_ae.py", "sample.py", "evaluate.py"}
"""Commands that get SIGINT; the others SIGTERM."""


def belonging_to(mark: str) -> list[str]:
    """The processes that have a mark in their environment, as this machine lists them."""
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(f"{folder.name} {(folder / 'cmdline').read_text()}")
        except OSError:  # it has just ended
            continue
    return found


def statuses(database: Path) -> list[str]:
    """Of the runs of stages that MLflow knows."""
    with closing(sqlite3.connect(database)) as connection:
        return [status for [status] in connection.execute("SELECT status FROM runs WHERE name != 'small'")]


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("script", LONG)
def test_a_command_that_is_stopped_leaves_no_process_a_killed_run_and_the_line_that_goes_on(
    script: str, finished: Experiment, tmp_path: Path
) -> None:
    (before, flags), stop = LONG[script], signal.SIGINT if script in CTRL_C else signal.SIGTERM
    long = small_training(100_000, checkpoint_every=5)
    experiment = replace(
        finished,
        root=str(copy_of(finished, tmp_path, *before)),
        autoencoder_training=long,
        cluster=replace(finished.cluster, decode_tasks=int(script not in IN_PROCESS)),
        prior_training=finished.prior_training if "prior" in before else replace(long, ema_decay=[0.9, 0.3]),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    if before:
        experiment = replace(experiment, autoencoder_training=finished.autoencoder_training)
    shutil.copy(Path(finished.root, "mlflow.db"), tmp_path)
    earlier, mark = len(statuses(tmp_path / "mlflow.db")), uuid.uuid4().hex
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(asdict(experiment)))
    words = [f"pipelines/{script}", "--config", str(file), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"BLD_MARK": mark}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=PIPELINES.parent, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 180
        while "RUNNING" not in statuses(tmp_path / "mlflow.db")[earlier:]:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        time.sleep(1)  # in which the run is told its parameters
        process.send_signal(stop)
        assert process.wait(SOON_S) == 128 + stop, (tmp_path / "log").read_text()
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1].startswith(
        f"stopped by {stop.name}; this goes on where it was: python {' '.join(words[:3])}"
    )
    assert "Traceback" not in said
    assert {*statuses(tmp_path / "mlflow.db")[earlier:]} == {"KILLED"}
    deadline = time.monotonic() + SOON_S
    while left := belonging_to(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
