"""A sweep as it runs: its ranks, its files, its runs in MLflow, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._private import worker as ray_worker

from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.sweep.config import SweepConfig
from cluster.sweep.run import room, sweep
from cluster.sweep.table import sweep_table
from cluster.training.checkpoints import newest_step
from tests.conftest import copy_of
from tests.console import unknown
from tests.servers import S3Server

ROOT = Path(__file__).parents[3]


READS = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
[experiment] = [each for each in client.search_experiments() if each.name == sys.argv[2]]
[sweep] = client.search_runs([experiment.experiment_id], "run_name = 'sweep'")
of_it = f"tags.mlflow.parentRunId = '{sweep.info.run_id}'"
children = [r for r in client.search_runs([experiment.experiment_id], of_it) if r.info.run_name.startswith("lambda")]
print(json.dumps({"best": sweep.data.tags["bld.best"], "children": {child.info.run_name: {
    "status": child.info.status,
    "lambda": child.data.params["diffusion.vlb_weight"],
    "best": child.data.tags.get("bld.best"),
    "bounds": [[m.step, m.value] for m in client.get_metric_history(child.info.run_id, "val_bound")],
} for child in children}}))
"""


def as_another_process_reads(uri: str, experiment: str) -> Any:
    """What MLflow's own client says of the sweep's run and its children, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READS, uri, experiment], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


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
    names = [f"lambda{weight:g}-cosine" for weight in (0.0, 0.5)]
    best_name = names[rows[0].values["diffusion.vlb_weight"] > 0]
    assert as_another_process_reads(f"sqlite:///{encoded.root}/mlflow.db", encoded.name) == {
        "best": best_name,
        "children": {
            name: {
                "status": "FINISHED",
                "lambda": str(weight),
                "best": "this" if name == best_name else None,
                "bounds": [[4, row.metrics["val_bound"]] for row in rows if row.trial == name],
            }
            for name, weight in zip(names, (0.0, 0.5), strict=True)
        },
    }
    # Ray Tune would hand the keys of S3, which are in this process's environment, to its trials by way of Ray's logs.
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "testsecret"
    node = ray_worker._global_node  # pyright: ignore[reportPrivateUsage]
    assert node is not None
    logs = Path(node.get_logs_dir_path())
    assert [path for path in logs.glob("runtime_env*") if b"testsecret" in path.read_bytes()] == []


def trial_processes() -> list[psutil.Process]:
    """Ray Tune's, in which trials train, of the cluster of this process."""
    node = ray_worker._global_node  # pyright: ignore[reportPrivateUsage]
    assert node is not None
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = list[psutil.Process]()
    for each in raylet.children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ray::ImplicitFunc" in " ".join(each.cmdline()):
                found.append(each)
    return found


def kill_twice(sweep_folder: Path) -> None:
    """Kill the process of the first trial once it has come beyond where it began, and again."""

    def step() -> int:
        return max((newest_step(str(path)) for path in sweep_folder.glob("*/prior")), default=0)

    for _ in range(2):
        before, processes = step(), list[psutil.Process]()
        while step() == before or not processes:
            time.sleep(0.01)
            processes = trial_processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)


@pytest.mark.long
def test_a_sweep_whose_command_and_trials_are_killed_goes_on_to_the_table_and_weights_of_one_that_was_not(
    encoded: Experiment, tmp_path: Path
) -> None:
    def experiment_in(folder: str) -> Experiment:
        space = {
            "prior_training.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "diffusion.schedule": ["linear", "cosine"],
        }
        settings = SweepConfig(space=space, search="optuna", trials=2, early_stopping="asha", steps=60, grace=20)
        training = replace(encoded.prior_training, checkpoint_every=3, log_every=20)
        root = copy_of(encoded, tmp_path / folder, "autoencoder", "latents")
        tracking = replace(encoded.tracking, uri=encoded.tracking.resolve(encoded.root), experiment=folder)
        cluster = replace(encoded.cluster, max_failures=1)
        changes = {"prior_training": training, "tracking": tracking, "cluster": cluster}
        return replace(encoded, root=str(root), sweep=replace(settings, reduction=2), **changes)

    whole, killed = experiment_in("whole"), experiment_in("killed")
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(asdict(killed), sort_keys=False))  # whose order names trials
    command = [sys.executable, "pipelines/sweep.py", "prior", "--config", str(tmp_path / "killed.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    begun = Path(killed.folder, "sweep")
    while not [*begun.glob("*/prior/checkpoint-*/meta.json")]:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    rows = sweep(whole)
    with ThreadPoolExecutor(1) as pool:
        kills = pool.submit(kill_twice, begun)
        good, failed = sweep(killed)
        kills.result(0)
    assert (good.outcome in ("finished", "stopped"), failed.outcome) == (True, "failed")
    assert "its process failed 2 times" in failed.why
    assert 0 < newest_step(f"{begun}/{failed.trial}/prior") < 60
    again = sweep(killed)
    assert again == rows
    assert {row.trial for row in rows} == {good.trial, failed.trial}
    for row in rows:
        folders = [Path(each.folder, "sweep", row.trial, "prior") for each in (whole, killed)]
        weights = [[path.read_bytes() for path in folder.glob("final/*.safetensors")] for folder in folders]
        assert weights[0] == weights[1]
    with closing(sqlite3.connect(f"{encoded.root}/mlflow.db")) as database:
        assert database.execute("SELECT name FROM runs WHERE status = 'RUNNING'").fetchall() == []


@pytest.mark.long
def test_trials_of_two_workers_on_s3_wait_for_room_and_are_there_for_the_next_start(
    encoded: Experiment, s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    copy_of(encoded, s3_server.folder / "bucket/sweeps", "autoencoder", "latents")
    cluster = replace(encoded.cluster, workers=2, cpus_per_worker=0.6)
    sweeps = SweepConfig(vlb_weights=[0.0, 0.5], schedules=["cosine"], steps=4, concurrent=9)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = replace(encoded, root=f"{s3}/sweeps", cluster=cluster, sweep=sweeps, tracking=tracking)
    rows = sweep(experiment)
    assert [row.outcome for row in rows] == ["finished", "finished"]
    assert files.read_json(f"{experiment.folder}/sweep/table.json")["rows"][0]["trial"] == rows[0].trial
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        found = database.execute("SELECT start_time, end_time FROM runs WHERE name = 'prior'").fetchall()
    (_, ended), (next_begun, _) = sorted(found)
    assert (next_begun < ended) == (room(experiment, "prior") > 1)
    made = {path: path.stat().st_mtime_ns for path in s3_server.folder.glob("bucket/sweeps/*/sweep/*/prior/**/*.*")}
    assert len(made) > 10
    assert sweep(experiment) == rows
    assert {path: path.stat().st_mtime_ns for path in made} == made
