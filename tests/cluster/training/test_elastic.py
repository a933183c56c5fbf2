"""Training on nodes that come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.train import ScalingConfig

import cluster.training.train as cluster_train
from bld_core.latents.loader import latent_batches
from bld_core.training.loop import Batch
from cluster.config.artifacts import Codes, open_codes
from cluster.config.experiment import Experiment
from cluster.ray_private.train import EvenWorkers
from cluster.runtime import ClusterConfig
from cluster.training.tasks import PriorTask, Worker
from cluster.training.train import train_prior
from tests.cluster.test_outages import REPOSITORY
from tests.cluster.training.test_train import curve_of
from tests.conftest import small_experiment, small_training
from tests.servers import Nodes


def test_only_so_many_workers_start_as_share_the_batch_evenly() -> None:
    policy = EvenWorkers(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}), 12)
    counts = [policy._count_possible_workers({"node": {"CPU": float(cores)}}) for cores in range(10)]  # pyright: ignore[reportPrivateUsage]
    assert counts == [0, 1, 2, 3, 4, 4, 6, 6, 6, 6]


def test_fewer_workers_than_none_or_more_than_all_are_refused() -> None:
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"cluster.min_workers is {wrong}; it must be from 0.*which is 2"):
            ClusterConfig(workers=2, min_workers=wrong)


STEPS, SHRINKS, GROWS = 40, 12, 26


class SeenTask(PriorTask):
    """Stage 2, each worker writing down what it gets; it stands still where a node is to go, or to come."""

    def __init__(self, experiment: Experiment, source: str, codes: Codes, folder: Path) -> None:
        super().__init__(experiment, source, codes)
        self.folder = folder

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        shrunk = self.folder / "shrunk"
        for now, batch in enumerate(super().batches(step, positions, worker), step):
            while (worker.world == 2 and now == SHRINKS and not shrunk.exists()) or (
                worker.world == 1 and now == GROWS
            ):
                (self.folder / f"waits-{worker.world}").touch()
                time.sleep(0.1)
            if worker.world == 1:
                shrunk.touch()
            seen = json.dumps([batch.sample_index.tolist(), list(batch.keys)])
            (self.folder / f"{now}-{worker.world}-{worker.rank}.json").write_text(seen)
            yield batch


def elastic(experiment: Experiment) -> Experiment:
    return replace(experiment, prior_training=small_training(STEPS, checkpoint_every=5))


def work(root: str, source: str, digits: dict[str, str], machines: dict[str, Any], folder: str) -> None:
    """The command."""
    small = elastic(small_experiment(Path(root), digits))
    cluster_train.PriorTask = partial(SeenTask, folder=Path(folder))  # pyright: ignore[reportAttributeAccessIssue]
    train_prior(replace(small, cluster=replace(small.cluster, **machines)), source=source)


@pytest.mark.long
def test_the_group_shrinks_and_grows_with_its_nodes_and_each_step_has_the_same_samples(
    encoded: Experiment, digits: dict[str, str], tmp_path: Path
) -> None:
    nodes = Nodes(tmp_path)
    folder, log = tmp_path / "seen", tmp_path / "log"
    folder.mkdir()
    machines = {
        "address": f"127.0.0.1:{nodes.port}",
        "workers": 2,
        "min_workers": 1,
        "cpus_per_worker": 0.7,
        "max_failures": 1,
    }
    arguments = json.dumps([str(tmp_path / "runs"), encoded.folder, digits, machines, str(folder)])
    call = "import json, sys; from tests.cluster.training.test_elastic import work; work(*json.loads(sys.argv[1]))"
    keys = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}

    def start() -> subprocess.Popen[bytes]:
        with open(log, "wb") as output:
            command = [sys.executable, "-c", call, arguments]
            return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | keys, stdout=output, stderr=output)

    def wait_for(file: str) -> subprocess.Popen[bytes]:
        process, deadline = start(), time.monotonic() + 180
        while not (folder / file).exists():
            assert time.monotonic() < deadline, log.read_text()
            if process.poll() is not None:  # the nodes are not there yet
                assert "lower cluster.workers" in log.read_text() or "no Ray cluster" in log.read_text(), (
                    log.read_text()
                )
                process = start()
            time.sleep(0.2)
        return process

    try:
        nodes.start()
        process = wait_for("waits-2")
        nodes.kill()
        deadline = time.monotonic() + 150
        while not (folder / "waits-1").exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        nodes.start()
        assert process.wait(150) == 0, log.read_text()
    finally:
        nodes.end()

    seen = defaultdict[tuple[int, int], list[list[Any]]](list)
    for path in sorted(folder.glob("*-*-*.json")):
        step, world, _ = map(int, path.stem.split("-"))
        seen[step, world].append(json.loads(path.read_text()))
    assert {world for step, world in seen if SHRINKS <= step < GROWS} >= {1}
    assert {world for step, world in seen if step >= GROWS} == {2}
    whole = replace(elastic(encoded), root=str(tmp_path / "undisturbed"))
    batches = latent_batches(open_codes(encoded.folder).train, whole.prior_training, whole.seed, 0)
    for step, batch in zip(range(STEPS), batches, strict=False):
        [*found] = [shares for (taken, _), shares in seen.items() if taken == step]
        assert found
        for shares in found:
            assert [index for share in shares for index in share[0]] == batch.sample_index.tolist()
            assert [key for share in shares for key in share[1]] == list(batch.keys)
    train_prior(whole, source=encoded.folder)
    curves = [curve_of(each, "prior") for each in (whole, replace(whole, root=str(tmp_path / "runs")))]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] == [*range(1, STEPS + 1)]
    assert max(abs(one - other) for (_, one), (_, other) in zip(*curves, strict=True)) <= 1e-4
