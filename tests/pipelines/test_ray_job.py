"""`ray job submit` on a cluster with token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.runtime import ClusterConfig
from cluster.sweep.config import SweepConfig
from tests.conftest import copy_of
from tests.servers import Nodes

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of its own, which has to be asked with a token; yields the job address and the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "BLD_ROOT": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port = free_port()
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={port}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    with open(tmp_path / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=5)
                break
            except urllib.error.HTTPError:
                break  # it answers: without the token, a refusal
            except OSError:
                time.sleep(0.5)
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.mark.long
def test_the_first_stage_trains_as_a_ray_job(
    head: tuple[str, dict[str, str]], tmp_path: Path, digits: dict[str, str]
) -> None:
    address, environment = head
    (tmp_path / "digits").symlink_to(Path(digits["train"]).parent)
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    job = ["python", "pipelines/stage1_ae.py", "--config", "configs/demo.yaml"]
    short = ["--autoencoder_training.steps", "3", "--cluster.workers", "1"]
    refused = subprocess.run(
        [*submit, *job, *short],
        cwd=REPOSITORY,
        env=environment | {"RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    lost = subprocess.run(
        [*submit, *job, "--root", "runs"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert lost.returncode != 0
    assert (
        "root is 'runs', relative to the copy of the code that Ray has made for this job" in lost.stdout + lost.stderr
    )
    done = subprocess.run(
        [*submit, *job, *short], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo/autoencoder/final/config.json").is_file()
    assert "next: python pipelines/encode_latents.py --config configs/demo.yaml" in done.stdout


@pytest.mark.long
def test_a_sweep_as_a_ray_job_uses_all_nodes_though_there_are_more_trials_than_fit(
    encoded: Experiment, tmp_path: Path
) -> None:
    root = copy_of(encoded, tmp_path / "runs", "autoencoder", "latents")
    cluster, sweep = ClusterConfig(cpus_per_worker=1.0), SweepConfig(steps=2, concurrent=9)
    experiment = replace(encoded, root=str(root), cluster=cluster, sweep=sweep)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(asdict(experiment)))
    nodes = Nodes(tmp_path)
    address = f"http://127.0.0.1:{nodes.dashboard}"
    # No copy of the code: with one it vanished under the job, as if nodes of one machine removed each other's.
    variables = json.dumps({"env_vars": {"PYTHONPATH": str(REPOSITORY)}})
    submit = [RAY, "job", "submit", "--address", address, "--runtime-env-json", variables, "--"]
    job = ["python", str(REPOSITORY / "pipelines/sweep_prior.py"), "--config", str(tmp_path / "small.yaml")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def alive() -> int:
        asked = urllib.request.Request(f"{address}/nodes?view=summary")
        asked.add_header("Authorization", f"Bearer {nodes.environment['RAY_AUTH_TOKEN']}")
        with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.read().count(b'"ALIVE"')
        return 0

    try:
        for count in (1, 2, 3):  # one after the other: together they starve on few cores
            if count > 1:
                nodes.start()
            while alive() < count:
                assert nodes.processes[-1].poll() is None
                time.sleep(0.5)
        environment = nodes.environment | {"PATH": path}
        done = subprocess.run(
            [*submit, *job], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        nodes.end()
    assert done.returncode == 0, done.stdout + done.stderr
    where = dict(re.findall(r"^(\S+): on \S+ \((\w+)\)$", done.stdout, re.M))
    assert len(where) == 4, done.stdout
    assert len({*where.values()}) == 3
    assert len(files.read_json(f"{root}/small/sweep/table.json")["rows"]) == 4
