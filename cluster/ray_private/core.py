"""Ray itself: how it is started, what its workers show, how a task waits for who takes its results."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
from collections.abc import Generator
from typing import Any

from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray.experimental import tqdm_ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put  # pyright: ignore[reportPrivateUsage]

from bld_core.errors import UserError

_NO_DASHBOARD = b"bld: no dashboard"
_EVERYWHERE = {
    # Ray Train gives a group of workers 60 s to start, within which a large environment is not unpacked.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # On few cores, Ray ends workers that have had nothing to do for a second; a new one takes seconds to be of use.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Ray Tune's older reporter says nothing where `verbose` is 0; the newer one prints a table and two paths anyway.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray Tune takes Ctrl-C for the wish to rank the trials that are there, as if they were all; and its handler stays.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
_LOCAL = {
    # Ray tells its makers which of its parts are used, Serve's among them.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train looks out for a cloud that takes nodes away, which a machine of one's own does not; Ray's core then
    # writes of its actor: "max_restarts > 0 ... the actor restart will fail".
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Data shares out what cores Ray Train leaves it in whole ones: of the one core that two workers of half a core
    # leave on two, its two streams get none each on paper, and still decode. After a minute it takes that for a job
    # that "may hang forever". That there are cores enough for all is what `connect_ray` checks.
    "RAY_DATA_STARVATION_WARNING_DELAY_S": "inf",
    # Ray warns of four processes for each that may start at once; two trainings side by side have as many.
    "RAY_worker_maximum_startup_concurrency": str(2 * (os.cpu_count() or 1)),
}


def set_environment() -> None:
    """Set up Ray's processes that start from here on, unless the user has."""
    for name, value in _EVERYWHERE.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def local_cluster(dashboard: bool) -> Generator[dict[str, Any]]:
    """Around `ray.init` of a cluster that ends with this process; yields its options.

    Where there is a dashboard, Ray Train asks it every second whether the training is still alive. Without
    RAY_API_SERVER_ADDRESS its processes would ask the cluster that was last started on this machine: if that is gone,
    every training ends 12 s late.

    What workers say is shown as they say it. Without that, "(RayTrainWorker pid=5395)" in cyan stands before each line,
    in files, too; on one machine it tells nothing, and on a cluster with an address of its own Ray keeps to it.

    Ray announces at each start that it asks for a token, as it should; its level is raised for the start alone.

    Args:
        dashboard: whether it has one; starting it takes seconds of a core.
    """
    for name, value in _LOCAL.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"include_dashboard": dashboard}
    if dashboard:
        options["dashboard_port"] = _free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{options['dashboard_port']}"
    ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = True
    log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield options
        if not dashboard:
            _internal_kv_put(_NO_DASHBOARD, b"yes")
    finally:
        log.setLevel(before)


def _free_port() -> int:
    """A port that nobody listens on, and that no connection takes until the dashboard does, seconds later.

    Those that the system hands out begin at 32768, and those of Ray's workers end at 19999.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("none of 100 ports between 20000 and 32000 is free on this machine: end what listens there")


def without_dashboard() -> bool:
    """Whether the cluster that this process is part of is a `local_cluster` that has none."""
    return _internal_kv_exists(_NO_DASHBOARD)


def remote_bar() -> type:
    """Ray's class of progress bars, for a remote worker, whose terminal is that of the command.

    Plain tqdm there would come line by line, each time that the bar moves.
    """
    return tqdm_ray.tqdm


def ahead(results: int) -> dict[str, Any]:
    """The option of a task by which it waits while this many of its streamed results are not yet taken.

    Without it, the task decodes a whole shard into Ray's object store.
    """
    return {"_generator_backpressure_num_objects": results}


def free_of_nodes() -> dict[str, dict[str, float]]:
    """What nobody holds of each node, by its id; Ray's public function adds them all up."""
    return available_resources_per_node()
