"""Training on nodes that come and go."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

import cluster.training.train as cluster_train
from bld_core.latents.loader import latent_batches
from bld_core.training.loop import Batch
from cluster.config.artifacts import Codes, open_codes
from cluster.config.experiment import Experiment
from cluster.ray_private.train import EvenWorkers
from cluster.runtime import ClusterConfig
from cluster.training.checkpoints import checkpoints
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


class NoticedTask(PriorTask):
    """Stage 2, which stands still until there is notice of a node, and takes its time from then on."""

    def __init__(self, experiment: Experiment, source: str, codes: Codes, folder: Path) -> None:
        super().__init__(experiment, source, codes)
        self.folder = folder

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        (self.folder / f"begins-{worker.world}-{step}").touch()
        for now, batch in enumerate(super().batches(step, positions, worker), step):
            while worker.world == 2 and now == SHRINKS and not (self.folder / "noticed").exists():
                [here] = [node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()]
                if "node:__internal_head__" not in here["Resources"]:
                    (self.folder / "node").write_text(here["NodeID"])
                    (self.folder / "waits-2").touch()
                time.sleep(0.1)
            if worker.world == 2 and now > SHRINKS:
                time.sleep(2)
            yield batch


def elastic(experiment: Experiment, checkpoint_every: int = 5) -> Experiment:
    return replace(experiment, prior_training=small_training(STEPS, checkpoint_every=checkpoint_every))


def work(root: str, source: str, digits: dict[str, str], machines: dict[str, Any], folder: str, noticed: bool) -> None:
    """The command."""
    small = elastic(small_experiment(Path(root), digits), 1000 if noticed else 5)
    task = partial(NoticedTask if noticed else SeenTask, folder=Path(folder))
    cluster_train.PriorTask = task  # pyright: ignore[reportAttributeAccessIssue]
    train_prior(replace(small, cluster=replace(small.cluster, **machines)), source=source)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head, and what each test leaves there."""
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        yield made
    finally:
        made.end()


class OnNodes:
    """The command on a head and a node that goes, and what it says.

    Args:
        nodes: the head, and perhaps one more.
        tmp_path: of everything else.
        encoded: has the latents.
        digits: its images.
        noticed: whether there is notice of a node that goes.
    """

    def __init__(
        self, nodes: Nodes, tmp_path: Path, encoded: Experiment, digits: dict[str, str], *, noticed: bool
    ) -> None:
        self.nodes = nodes
        if len(nodes.processes) == 1:
            nodes.start()
        self.folder, self._log = tmp_path / "seen", tmp_path / "log"
        self.folder.mkdir()
        machines = {
            "address": f"127.0.0.1:{self.nodes.port}",
            "workers": 2,
            "min_workers": 1,
            "cpus_per_worker": 0.7,
            "max_failures": 0 if noticed else 1,
            "wait_for_nodes": 120,
        }
        self._arguments = json.dumps(
            [str(tmp_path / "runs"), encoded.folder, digits, machines, str(self.folder), noticed]
        )
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        call = "import json, sys; from tests.cluster.training.test_elastic import work; work(*json.loads(sys.argv[1]))"
        command = [sys.executable, "-c", call, self._arguments]
        with open(self._log, "wb") as output:
            return subprocess.Popen(command, cwd=REPOSITORY, env=self.nodes.environment, stdout=output, stderr=output)

    def __enter__(self) -> OnNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not found():
            assert time.monotonic() < deadline, self.said()
            if self.process.poll() is not None:  # the head does not answer yet
                assert "no Ray cluster" in self.said(), self.said()
                self.process = self._start()
            time.sleep(0.2)


@pytest.mark.long
def test_the_group_shrinks_and_grows_with_its_nodes_and_each_step_has_the_same_samples(
    encoded: Experiment, digits: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    with OnNodes(nodes, tmp_path, encoded, digits, noticed=False) as command:
        folder = command.folder
        command.wait_for((folder / "waits-2").exists)
        nodes.kill()
        command.wait_for((folder / "waits-1").exists)
        nodes.start()
        assert command.process.wait(150) == 0, command.said()

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


@pytest.mark.long
def test_notice_of_a_node_that_will_go_keeps_a_checkpoint(
    encoded: Experiment, digits: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    """With neither a checkpoint of the plan nor a failure allowed, the training goes on from where the notice came."""
    with OnNodes(nodes, tmp_path, encoded, digits, noticed=True) as command:
        folder = command.folder
        command.wait_for((folder / "waits-2").exists)
        words = ["--node-id", (folder / "node").read_text(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "its machine goes", "--deadline-remaining-seconds", "20"]
        drain = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address=127.0.0.1:{nodes.port}", *words]
        subprocess.run(drain, check=True, env=nodes.environment, capture_output=True)
        time.sleep(6)  # every 5 seconds Ray Train looks
        (folder / "noticed").touch()
        command.wait_for(lambda: bool(checkpoints(str(tmp_path / "runs/small/prior"))))
        assert command.process.wait(150) == 0, command.said()  # the node outlives its notice, but takes no part
        nodes.kill()
    said = re.search(
        r"prior: node \w{8} will be taken away in (\d+) s; keeping a checkpoint of step (\d+)", command.said()
    )
    assert said is not None, command.said()
    kept = int(said[2])
    assert kept > SHRINKS
    assert {path.name for path in folder.glob("begins-*")} == {"begins-2-0", f"begins-1-{kept}"}
