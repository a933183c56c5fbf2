"""Work on actors: what has died is begun again, as often as it may; what is gone is waited for, but not for ever."""

from __future__ import annotations

import _thread
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ObjectReconstructionFailedError

import cluster.nodes.watch
import cluster.runtime
from bld_core.errors import UserError
from cluster.config.experiment import Experiment
from cluster.nodes.placement import Need
from cluster.nodes.watch import Watch, nodes_watched
from cluster.runtime import ClusterConfig, connect_ray, finished_on_actors
from cluster.training.train import train_autoencoder

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("ray_session")


class Fragile:
    """An actor whose process is killed by the first call for the first item, and by every call for the others."""

    def __init__(self, folder: Path) -> None:
        self.seen = folder / "seen"

    def square(self, number: int) -> int:
        if number > 3 or not self.seen.exists():
            self.seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2


def test_a_piece_of_work_is_begun_again_max_failures_times(tmp_path: Path) -> None:
    config = ClusterConfig(cpus_per_worker=0.25, max_failures=1)
    connect_ray(config)
    done = finished_on_actors(Fragile, (tmp_path,), "square", [3, 4], config)
    assert next(done) == (0, 9)
    with pytest.raises(UserError, match=r"the actor Fragile died 2 times, at last on node \S+, as its worker process"):
        next(done)


class Square:
    """An actor."""

    def square(self, number: int) -> int:
        return number**2


def test_a_result_that_ray_says_is_lost_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig(cpus_per_worker=0.25, max_failures=1)
    connect_ray(config)
    lost = list[Any]()

    def fetch(reference: Any) -> int:
        if len(lost) < losses:
            lost.append(reference)
            raise ObjectReconstructionFailedError(reference.hex(), None, "")
        assert reference not in lost
        return ray.get(reference)

    monkeypatch.setattr(cluster.runtime, "fetch", fetch)
    losses = 1
    assert dict(finished_on_actors(Square, (), "square", [3, 4], config)) == {0: 9, 1: 16}
    losses = 100
    with pytest.raises(
        UserError, match=r"what the actor Square had made, or was given, was lost 2 times, .*; cluster.m"
    ):
        list(finished_on_actors(Square, (), "square", [3, 4], config))


class Here:
    """Says which process it is in."""

    def process(self, number: int) -> tuple[int, int]:
        return number, os.getpid()


def test_without_workers_and_decoding_tasks_this_process_does_it_all(encoded: Experiment, tmp_path: Path) -> None:
    config = ClusterConfig(workers=0, decode_tasks=0)
    done = list(finished_on_actors(Here, (), "process", [7, 8], config))
    assert done == [(0, (7, os.getpid())), (1, (8, os.getpid()))]
    if not torch.cuda.is_available():  # which Ray would look for elsewhere
        on_gpu = replace(encoded, root=str(tmp_path), cluster=replace(encoded.cluster, gpu=True))
        with pytest.raises(UserError, match=r"cluster.gpu is true, but this process, .* sees no GPU: set it to false"):
            train_autoencoder(on_gpu)


WITHOUT_RAY = """
import sys
from dataclasses import replace
from pathlib import Path
import ray
from cluster.data.encode import encode_latents, verify_latents
from cluster.evaluation.evaluate import evaluate
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import small_experiment
root, train, validation = sys.argv[1:]
experiment = small_experiment(Path(root), {"train": train, "validation": validation})
train_autoencoder(experiment)
encode_latents(experiment)
print(verify_latents(experiment))
train_prior(experiment)
draw_grid(experiment, GridConfig(rows=2))
evaluate(experiment)
assert not ray.is_initialized()
"""


@pytest.mark.long
def test_the_whole_order_of_work_starts_no_ray(encoded: Experiment, digits: dict[str, str], tmp_path: Path) -> None:
    """Nor does it ask for the cluster that is named: nothing listens there."""
    command = [sys.executable, "-c", WITHOUT_RAY, str(tmp_path), digits["train"], digits["validation"]]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified 5 files, 1797 rows" in done.stdout
    for made in (f"{encoded.name}/latents/manifest.json", f"{encoded.name}/autoencoder/final/model.safetensors"):
        assert (tmp_path / made).read_bytes() == Path(encoded.root, made).read_bytes()


class Damaged:
    """An actor that finds at its start that a file is damaged."""

    def __init__(self, file: str) -> None:
        raise UserError(f"{file} has sha256 0123, config.json says 4567", stages=("prior",))

    def square(self, number: int) -> int:
        return number**2


def test_what_an_actor_finds_at_its_start_is_raised_as_it_was() -> None:
    config = ClusterConfig(cpus_per_worker=0.25, max_failures=1)
    connect_ray(config)
    with pytest.raises(UserError) as raised:
        list(finished_on_actors(Damaged, ("model.safetensors",), "square", [3, 4], config))
    assert str(raised.value) == "model.safetensors has sha256 0123, config.json says 4567"
    assert raised.value.stages == ("prior",)


def test_nodes_that_are_gone_are_named_and_not_waited_for_without_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.nodes.watch, "LOOK_S", 0.0)
    connect_ray(ClusterConfig(cpus_per_worker=0.25))
    cpus = ray.cluster_resources()["CPU"]
    assert Watch(Need(cpus, 0), 0).look() is None, "all is there"
    watch = Watch(Need(cpus + 1.5, 1), 0.2)
    assert watch.look() is None
    assert watch.look() is None
    line = (
        rf"waiting: the Ray cluster has {cpus:g} of {cpus + 1.5:g} CPU cores and 0 of 1 GPUs .*, since \d\d:\d\d:\d\d"
    )
    assert re.fullmatch(rf"{line}; for 0 s more\n", capsys.readouterr().err), "once in 30 seconds"
    time.sleep(0.2)
    assert re.search(r"cluster.patience is 0.2 s: .* run the same command again", str(watch.look()))


def test_waiting_for_ray_ends_with_the_nodes_and_by_ctrl_c(monkeypatch: pytest.MonkeyPatch, ctrl_c: None) -> None:
    monkeypatch.setattr(cluster.nodes.watch, "LOOK_S", 0.1)
    connect_ray(ClusterConfig(cpus_per_worker=0.25))
    with pytest.raises(UserError, match="of 1000 CPU cores"), nodes_watched(Need(1000, 0), 0.2):
        ray.get(sleep.remote(60))
    interrupt = threading.Timer(0.5, _thread.interrupt_main)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt), nodes_watched(Need(0, 0), 0):
        ray.get(sleep.remote(60))


@ray.remote(num_cpus=0)
def sleep(seconds: float) -> None:
    time.sleep(seconds)
