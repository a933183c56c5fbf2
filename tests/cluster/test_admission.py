"""A cluster that is too small now: refused where it stays so, and waited for, aloud, where nodes are to come."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import ray

import cluster.nodes.watch
from bld_core.errors import UserError
from cluster.nodes.watch import wait_until_held
from cluster.runtime import ClusterConfig, connect_ray
from tests.cluster.test_outages import looks
from tests.servers import Nodes


def test_a_node_that_comes_ends_the_waiting_and_where_none_is_to_come_nothing_waits(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.nodes.watch, "_TURN_S", 0.01)
    connect_ray(ClusterConfig(cpus_per_worker=0.25))
    capsys.readouterr()
    refusals = iter([UserError("1 of 2 CPU cores")] * 3)

    def check() -> None:
        if (refusal := next(refusals, None)) is not None:
            raise refusal

    with pytest.raises(UserError, match=r"^1 of 2 CPU cores$"):
        wait_until_held(check, 0)
    assert capsys.readouterr().err == ""
    wait_until_held(check, 600)
    address = re.escape(ray.get_runtime_context().gcs_address)
    line = (
        r"waiting for nodes, since \d\d:\d\d:\d\d, for (600|599) s more: 1 of 2 CPU cores; "
        rf"`ray status --address={address}` shows what is there\n"
    )
    assert re.fullmatch(line, capsys.readouterr().err), "once in 5 seconds"


@pytest.mark.long
def test_an_autoscaler_is_asked_for_what_is_missing_and_what_it_never_can_make_is_refused(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, head_cpus=0, grows=2)
    try:
        code, said = looks(nodes, workers=2, cpus_per_worker=0.7)
        assert code == 0, said
        assert "0.25 for decoding need 1.65, but the Ray cluster has 0: lower cluster.workers" in said
        began = time.monotonic()
        code, said = looks(nodes, workers=3, cpus_per_worker=0.7)
        assert code == 2, said
        assert "need 2.35, but the Ray cluster has 2: lower cluster.workers" in said
        assert "; and its autoscaler has no kinds of nodes, or too few of them, that would hold it" in said
        assert time.monotonic() - began < 60
    finally:
        nodes.end()
