"""Two kinds of nodes: workers and the tasks that decode for them run where their labels say, or are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

import cluster.data.decoding
import cluster.data.encode
import cluster.data.ingest
import cluster.ray_private.train
import cluster.runtime
import cluster.training.train
from bld_core.errors import UserError
from bld_core.training.loop import Batch
from cluster.config.experiment import Experiment
from cluster.data.encode import Encoder, encode_latents
from cluster.nodes.labels import matches
from cluster.nodes.placement import Need, cluster_has
from cluster.ray_private.train import EvenWorkers
from cluster.runtime import ClusterConfig
from cluster.training.tasks import AutoencoderTask, Worker
from cluster.training.train import train_autoencoder
from tests.cluster.test_outages import REPOSITORY, looks
from tests.conftest import small_experiment, small_training
from tests.pipelines.test_commands import run
from tests.servers import Nodes

TYPE = "ray.io/accelerator-type"


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("gpu", {"gpu"}),
        ("!gpu", {"cpu", ""}),
        ("in(gpu,cpu)", {"gpu", "cpu"}),
        ("in(spot)", set[str]()),
        ("!in(gpu,spot)", {"cpu", ""}),
    ],
)
def test_a_selector_means_the_nodes_that_ray_takes(value: str, taken: set[str]) -> None:
    assert {pool for pool in ("gpu", "cpu", "") if matches({"pool": pool} if pool else {}, {"pool": value})} == taken


def test_every_label_of_a_selector_counts_and_none_means_all_nodes() -> None:
    selector = {"pool": "gpu", TYPE: "in(H100,H200)"}
    assert matches({"pool": "gpu", TYPE: "H200", "zone": "a"}, selector)
    assert not matches({"pool": "gpu", TYPE: "A100"}, selector)
    assert not matches({TYPE: "H100"}, selector)
    assert matches({}, {})


@pytest.mark.parametrize("value", ["", "!", "!!a", "in()", "in(a, b)", "in(a,b", "(a,b)", "-a", "a b", "a" * 64])
def test_a_value_that_ray_refuses_or_never_finds_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^cluster.decode_nodes has 'pool': '.*'; a label is named .* in\(a,b\) or"):
        ClusterConfig(decode_nodes={"pool": value})


def test_a_name_that_no_label_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"^cluster.worker_nodes has 'a b': 'c'; a label is named as pool or"):
        ClusterConfig(worker_nodes={"a b": "c"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster.worker_nodes", "{pool: [gpu]}"], r"cluster\.worker_nodes.*\n?.*str"),
        (["--cluster.worker_nodes", "gpu"], r"cluster\.worker_nodes.*\n?.*dict"),
        (["--cluster.worker_nodes", "{pool: 'in(gpu, spot)'}"], r"error: cluster\.worker_nodes has 'pool': 'in\(gpu, "),
        (["--cluster.worker_node", "{pool: gpu}"], r"the nearest is 'cluster\.worker_nodes'"),
    ],
)
def test_a_wrong_selector_on_the_command_line_is_one_message(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "stage1_ae.py", "--config", "configs/demo.yaml", *words) == 2
    assert re.search(message, capsys.readouterr().err)


GPU, CPU = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that takes no work, two nodes with GPUs, one of which may go, and two with cores alone."""
    nodes: list[tuple[dict[str, str], dict[str, float]]] = [
        ({}, {}),
        ({"pool": "gpu"}, GPU),
        ({"pool": "spot"}, GPU),
        ({"pool": "cpu"}, CPU),
        ({"pool": "cpu"}, CPU),
    ]
    there = [
        {"NodeID": str(i), "Alive": True, "Labels": labels, "Resources": has} for i, (labels, has) in enumerate(nodes)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: there)


def admitted(**fields: Any) -> None:
    cluster.runtime._check(ClusterConfig(**fields))  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("five")
def test_only_nodes_that_match_are_counted() -> None:
    on_gpus, on_cpus = {"pool": "in(gpu,spot)"}, {"pool": "cpu"}
    admitted(workers=32, worker_nodes=on_cpus, decode_nodes=on_gpus)
    admitted(workers=2, cpus_per_worker=4, gpu=True, worker_nodes=on_gpus, decode_nodes=on_cpus)
    admitted(workers=2, cpus_per_worker=4, gpu=True, worker_nodes=on_gpus)
    for fields, message in [
        (
            {"workers": 2, "cpus_per_worker": 4, "worker_nodes": on_gpus, "decode_nodes": on_gpus},
            r"need 8.25, but that part of the Ray cluster \(2 of 5 nodes, 8 CPU cores\) which matches "
            r"cluster.worker_nodes \{pool: in\(gpu,spot\)\} or cluster.decode_nodes .* has 8: lower cluster.workers",
        ),
        (
            {"workers": 2, "gpu": True, "worker_nodes": {"pool": "gpu"}},
            r"2 workers need 2 GPUs, but that part .* \(1 of 5 nodes, 4 CPU .* \{pool: gpu\} has 1: lower",
        ),
        (
            {"cpus_per_worker": 5, "worker_nodes": on_gpus},
            r"a worker of 5 CPU .* fits on no single node of that part .* matches cluster.worker_nodes .*, the largest",
        ),
        (
            {"workers": 9, "worker_nodes": on_gpus},
            r"9 workers of 1 CPU .* do not fit on the nodes of that part .*, which hold 8,",
        ),
        (
            {"decode_nodes": {"pool": "!in(gpu,spot,cpu)"}},
            r"takes 0.25 CPU cores, which no single node of that part .* \(1 of 5 nodes, 0 CPU cores\) which matches "
            r"cluster.decode_nodes .* has: correct cluster.decode_nodes",
        ),
        (
            {"worker_nodes": {"pool": "gpus", "zone": "a"}},
            r"cluster.worker_nodes is \{pool: gpus, zone: a\}, which none of the 5 nodes of the Ray cluster matches "
            r"\(pool is cpu or gpu or spot; none has zone\): correct it, or start nodes with such labels",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            admitted(**fields)
    admitted(decode_nodes={"pool": "none"}, decode_tasks=0)


@pytest.mark.usefixtures("five")
def test_what_is_missing_is_said_of_the_nodes_that_lack_it() -> None:
    assert ClusterConfig(workers=40).need == Need(40.25, 0)
    assert ClusterConfig(workers=40).need.missing(cluster_has) == "40 of 40.25 CPU cores"
    gpus = ClusterConfig(workers=2, gpu=True, worker_nodes={"pool": "gpu"})
    assert gpus.need.missing(cluster_has) == "1 of 2 GPUs on nodes of {pool: gpu}"
    assert replace(gpus, workers=1, decode_nodes={"pool": "x"}).need.missing(cluster_has) == (
        "0 of 0.25 CPU cores on nodes of {pool: x}"
    )
    both = ClusterConfig(workers=8, worker_nodes={"pool": "!cpu"}, decode_nodes={"pool": "gpu"})
    assert both.need.missing(cluster_has) == "8 of 8.25 CPU cores on nodes of {pool: !cpu} or {pool: gpu}"


@pytest.mark.usefixtures("five")
def test_work_that_decodes_nothing_does_without_the_nodes_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ClusterConfig(worker_nodes={"pool": "cpu"}, decode_nodes={"pool": "x"})
    assert "on nodes of {pool: x}" in gone.of_work(decodes=True).need.missing(cluster_has)
    assert gone.of_work(decodes=False).need.missing(cluster_has) == ""
    assert gone.training_need(decodes=False).missing(cluster_has) == ""
    assert [bundle.on for bundle in gone.of_work(decodes=False).bundles] == [{"pool": "cpu"}, {}]


@pytest.mark.usefixtures("five")
def test_a_training_of_changing_width_counts_nodes_that_match(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"CPU": 1.0}
    policy = EvenWorkers(
        ScalingConfig(num_workers=(1, 64), resources_per_worker=resources, label_selector={"pool": "in(gpu,spot)"}), 64
    )
    reserved_elsewhere = {"3": {"CPU": 16.0}, "4": {"CPU": 16.0}}
    assert policy._count_possible_workers(reserved_elsewhere) == 8  # pyright: ignore[reportPrivateUsage]
    policy._starts = True  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(cluster.ray_private.train, "_answering", lambda: {"0", "2", "3"})
    assert policy._count_possible_workers(reserved_elsewhere) == 4  # pyright: ignore[reportPrivateUsage]


def note(folder: Path, what: str) -> None:
    """Write down on which node this process is."""
    with open(folder / what, "a") as file:
        file.write(f"{ray.get_runtime_context().get_node_id()}\n")


def noted(folder: Path, what: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A task that says where it runs."""

    def noting(*arguments: Any, **named: Any) -> Any:
        note(folder, what)
        return work(*arguments, **named)

    return noting


class PlacedTask(AutoencoderTask):
    """Stage 1 that says where its worker and its tasks run."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        super().__init__(experiment)
        self.folder = folder

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        note(self.folder, "worker")
        for task in ("read_visit", "decode_block"):
            setattr(cluster.data.ingest, task, noted(self.folder, task, getattr(cluster.data.ingest, task)))
        return super().batches(step, positions, worker)


class PlacedEncoder(Encoder):
    """An encoder that says where it and its tasks run."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        note(folder, "encoder")
        decode = cluster.data.decoding.decode_shard

        def noting(*some: Any) -> Any:
            note(folder, "decode_shard")
            yield from decode(*some)

        cluster.data.decoding.decode_shard = noting
        super().__init__(*arguments)


def two_stages(folder: Path, digits: dict[str, str], fields: dict[str, Any], actors: Callable[..., Any]) -> None:
    """Stage 1 and the encode job on some machines; `actors` makes those that encode."""

    def told_the_folder(kind: type, arguments: tuple[Any, ...], *more: Any, **named: Any) -> Any:
        return actors(kind, (folder, *arguments), *more, **named)

    folder.mkdir()
    small = small_experiment(folder, digits)
    machine = replace(small.cluster, workers=1, decode_tasks=1, **fields)
    small = replace(small, autoencoder_training=small_training(12), cluster=machine)
    cluster.training.train.AutoencoderTask = partial(PlacedTask, folder=folder)  # pyright: ignore[reportAttributeAccessIssue]
    train_autoencoder(small)
    cluster.data.encode.Encoder = type("Encoder", (PlacedEncoder,), {})
    cluster.data.encode.finished_on_actors = told_the_folder
    encode_latents(small)


def work(root: str, digits: dict[str, str], machines: dict[str, dict[str, Any]]) -> None:
    """The two stages on each of some machines, with a folder for each."""
    actors = cluster.data.encode.finished_on_actors
    for name, fields in machines.items():
        two_stages(Path(root, name), digits, fields, actors)


@pytest.mark.long
def test_workers_and_decoding_are_where_their_labels_say(digits: dict[str, str], tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, head_cpus=2, labels="pool=gpu")
    call = "import json, sys; from tests.cluster.test_placement import work; work(*json.loads(sys.argv[1]))"
    keys = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    here: dict[str, Any] = {"address": f"127.0.0.1:{nodes.port}", "cpus_per_worker": 0.5, "wait_for_nodes": 300}
    machines = {
        "apart": here | {"worker_nodes": {"pool": "!decode"}, "decode_nodes": {"pool": "decode"}},
        "near": here | {"worker_nodes": {"pool": "gpu"}},
    }
    try:
        code, said = looks(nodes, cpus_per_worker=0.5, worker_nodes={"pool": "gpus"})
        assert code == 2, said
        assert "cluster.worker_nodes is {pool: gpus}, which none of the 1 nodes of the Ray cluster matches" in said
        nodes.start(labels="pool=decode")
        command = [sys.executable, "-c", call, json.dumps([str(tmp_path), digits, machines])]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | keys, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        whats = "worker", "read_visit", "decode_block", "encoder", "decode_shard"
        apart, near = (
            {what: Counter((tmp_path / name / what).read_text().split()) for what in whats} for name in machines
        )
        assert all(len(where) == 1 for where in apart.values()), apart
        [head], [other] = apart["worker"], apart["decode_block"]
        assert head != other
        assert [*apart["encoder"]] == [head]
        assert [*apart["read_visit"]] == [*apart["decode_shard"]] == [other]
        assert apart["decode_block"].total() > 1
        assert [*near["worker"]] == [*near["encoder"]] == [head]
        for task in ("read_visit", "decode_block", "decode_shard"):
            assert near[task][head] > 0.9 * near[task].total(), near  # there is room for all, and a core elsewhere
    finally:
        nodes.end()
