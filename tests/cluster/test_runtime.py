"""Work on actors: what has died is begun again, as often as it may."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from bld_core.errors import UserError
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
