"""A sweep as it runs: its ranks, its files, its runs in MLflow, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from ray._private import worker as ray_worker

from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.sweep.config import SweepConfig
from cluster.sweep.run import sweep
from cluster.sweep.table import sweep_table
from tests.conftest import copy_of
from tests.console import unknown

ROOT = Path(__file__).parents[3]


@pytest.mark.long
def test_a_sweep_ranks_its_trials_and_names_the_best(encoded: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = replace(encoded, sweep=replace(encoded.sweep, vlb_weights=[0.0, 0.5], schedules=["cosine"]))
    rows = sweep(experiment)
    assert unknown(capsys.readouterr().out) == []
    assert sorted((*row.values.values(),) for row in rows) == [(0.0, "cosine"), (0.5, "cosine")]
    bounds = [row.metrics["val_bound"] for row in rows]
    assert bounds[0] < bounds[1]
    assert rows[1].difference == pytest.approx(bounds[1] - bounds[0])
    assert 0 < rows[1].difference_se < rows[1].metrics["val_bound_se"]
    table = files.read_json(f"{encoded.folder}/sweep/table.json")
    assert [row["bound"] for row in table["rows"]] == bounds
    assert {row["schedule"] for row in table["rows"]} == {"cosine"}
    best = yaml.safe_load(Path(encoded.folder, "sweep/best.yaml").read_text())
    assert best == {"diffusion": {"vlb_weight": table["rows"][0]["vlb_weight"], "schedule": "cosine"}}
    assert f"{bounds[0]:.4f}" in sweep_table(rows)
    with closing(sqlite3.connect(f"{encoded.root}/mlflow.db")) as database:
        found = database.execute(
            "SELECT runs.name, runs.status, p.value, c.name FROM runs JOIN tags t ON t.run_uuid = runs.run_uuid "
            "AND t.key = 'mlflow.parentRunId' JOIN runs c ON c.run_uuid = t.value LEFT JOIN params p ON p.run_uuid = "
            "runs.run_uuid AND p.key = 'diffusion.vlb_weight' WHERE c.name = 'sweep' AND runs.name LIKE 'lambda%' "
            "ORDER BY runs.name"
        ).fetchall()
    assert found == [(f"lambda{weight:g}-cosine", "FINISHED", str(weight), "sweep") for weight in (0.0, 0.5)]
    # Ray Tune would hand the keys of S3, which are in this process's environment, to its trials by way of Ray's logs.
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "testsecret"
    node = ray_worker._global_node  # pyright: ignore[reportPrivateUsage]
    assert node is not None
    logs = Path(node.get_logs_dir_path())
    assert [path for path in logs.glob("runtime_env*") if b"testsecret" in path.read_bytes()] == []


@pytest.mark.long
def test_a_sweep_by_optuna_that_is_killed_goes_on_to_the_table_and_weights_of_one_that_was_not(
    encoded: Experiment, tmp_path: Path
) -> None:
    def experiment_in(folder: str) -> Experiment:
        space = {
            "prior_training.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "diffusion.schedule": ["linear", "cosine"],
        }
        settings = SweepConfig(space=space, search="optuna", trials=3, early_stopping="asha", steps=60, grace=20)
        root = copy_of(encoded, tmp_path / folder, "autoencoder", "latents")
        tracking = replace(encoded.tracking, uri=encoded.tracking.resolve(encoded.root), experiment=folder)
        return replace(encoded, root=str(root), sweep=settings, tracking=tracking)

    whole, killed = experiment_in("whole"), experiment_in("killed")
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(asdict(killed), sort_keys=False))  # whose order names trials
    command = [sys.executable, "pipelines/sweep.py", "prior", "--config", str(tmp_path / "killed.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    begun = Path(killed.folder, "sweep")
    while (
        len(list(begun.glob("*/prior/checkpoint-*/meta.json"))) < 3
    ):  # two of the first trial, or the second has begun
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trained = {path: path.read_bytes() for path in begun.glob("*/prior/final/model.safetensors")}
    rows, again = sweep(whole), sweep(killed)
    assert [replace(row, why="") for row in again] == [replace(row, why="") for row in rows]
    assert len(rows) == 3
    assert {path: path.read_bytes() for path in trained} == trained
    for row in rows:
        weights = [
            sorted(Path(each.folder, "sweep", row.trial).glob("prior/final/*.safetensors")) for each in (whole, killed)
        ]
        assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    with closing(sqlite3.connect(f"{encoded.root}/mlflow.db")) as database:
        assert database.execute("SELECT name FROM runs WHERE status = 'RUNNING'").fetchall() == []
