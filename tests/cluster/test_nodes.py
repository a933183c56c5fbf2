"""A cluster that cannot hold the work is refused with both numbers, and one that is busy is said to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import ray

import cluster.nodes.watch
from bld_core.errors import UserError
from cluster.nodes.placement import Need, check_nodes
from cluster.nodes.watch import say_if_busy
from cluster.runtime import ClusterConfig, connect_ray

TWO, FOUR, GPUS = {"CPU": 2.0}, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 2.0}
HEAD: Mapping[str, float] = {"memory": 1e9}  # that takes no work


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "nodes", "message"),
    [
        (4, 2.0, 0, [HEAD, FOUR, FOUR], ""),
        (40, 0.1, 0, [FOUR], ""),
        (2, 1.0, 1, [FOUR, GPUS], ""),
        (1, 3.0, 0, [TWO, TWO], r"a worker of 3 CPU cores fits on no single node .*, the largest has 2 CPU cores:"),
        (1, 3.0, 1, [GPUS, FOUR], r"a worker of 3 CPU cores and a GPU fits on no .* with a GPU has 2 CPU cores:"),
        (3, 3.0, 0, [FOUR, FOUR], r"3 workers of 3 CPU cores each do not fit on .*, which hold 2, .* lower"),
        (4, 0.5, 0.5, [FOUR, GPUS], ""),
        (4, 0.5, 0.6, [GPUS], r"4 workers of 0.5 CPU cores and 0.6 of a GPU each do not fit on .*, which hold 2, .*"),
        (3, 1.0, 1, [FOUR, GPUS], r"3 workers of 1 CPU cores and a GPU each do not fit on .*, which hold 2, .*"),
    ],
)
def test_workers_fit_on_single_nodes_or_are_refused(
    workers: int, cpus: float, gpus: float, nodes: list[Mapping[str, float]], message: str
) -> None:
    if not message:
        check_nodes(workers, cpus, gpus, nodes)
        return
    with pytest.raises(UserError, match=message):
        check_nodes(workers, cpus, gpus, nodes)


def test_two_workers_of_a_training_share_no_gpu() -> None:
    assert ClusterConfig(gpu=True, gpu_share=0.25).need == Need(1.25, 0.25)
    with pytest.raises(UserError, match=r"gpu_share is 0.5 with cluster.workers 2: .* which NCCL"):
        ClusterConfig(workers=2, gpu=True, gpu_share=0.5)
    with pytest.raises(UserError, match=r"gpu_share is 1.5; it must be above 0 and at most 1"):
        ClusterConfig(gpu_share=1.5)


def test_a_busy_cluster_is_said_in_one_line_and_one_that_becomes_free_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.nodes.watch, "_SETTLES_S", 0.3)
    seen = iter([{"CPU": 1.0}, {"CPU": 4.0}])
    say_if_busy(Need(4.0, 0), lambda: next(seen))
    assert capsys.readouterr().err == ""
    say_if_busy(Need(4.25, 2), lambda: {"CPU": 1.5})
    assert capsys.readouterr().err == (
        "waiting: of what the work needs 1.5 of 4.25 CPU cores and 0 of 2 GPUs are free; others hold the rest until "
        "they end\n"
    )


class Other:
    """Somebody else's work."""

    def here(self) -> bool:
        return True


def test_cores_that_others_hold_are_waited_for_aloud(ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = ClusterConfig(cpus_per_worker=0.25)
    connect_ray(config)
    cores = ray.cluster_resources()["CPU"]
    capsys.readouterr()
    other: Any = ray.remote(Other).options(num_cpus=1).remote()
    assert ray.get(other.here.remote())
    address = ray.get_runtime_context().gcs_address
    connect_ray(ClusterConfig(address=address, cpus_per_worker=cores - 0.5))
    ray.kill(other)
    assert f"of {cores - 0.25:g} CPU cores are free; others hold" in capsys.readouterr().err
