"""Work on actors: what has died is begun again, as often as it may."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from cluster.runtime import ClusterConfig, connect_ray, finished_on_actors

pytestmark = pytest.mark.usefixtures("ray_session")


class Fragile:
    """An actor whose process is killed at each of the first calls."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self.folder, self.deaths = folder, deaths

    def square(self, number: int) -> int:
        seen = len(list(self.folder.iterdir()))
        if seen < self.deaths:
            (self.folder / str(seen)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2


def test_a_piece_of_work_is_begun_again_max_failures_times(tmp_path: Path) -> None:
    config = ClusterConfig(cpus_per_worker=0.25, max_failures=1)
    connect_ray(config)
    for deaths in (1, 2):
        (tmp_path / str(deaths)).mkdir()
    once, twice = (
        finished_on_actors(Fragile, (tmp_path / str(deaths), deaths), "square", [3], config) for deaths in (1, 2)
    )
    assert list(once) == [(0, 9)]
    with pytest.raises(RayActorError):
        list(twice)
