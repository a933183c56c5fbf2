"""All that relies on Ray's private modules, or on switches that its guide does not name; each seen in Ray 2.60.

Where Ray is upgraded, this is the file to read: it says what each of them is for, and what happens without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ray
import tqdm
from ray._private import ray_constants
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayActorError
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision
from ray.tune.execution import class_cache

from bld_core.errors import UserError

_TURN_S = 0.05
_ANSWER_S = 3.0
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


def keep_keys_from_tune() -> None:
    """Ray Tune hands AWS_* of a command to its trials in a runtime environment, which Ray writes into its logs.

    Without it trials have the keys of their node, as all other work has.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update({name for name in os.environ if name.startswith("AWS_")})


@contextlib.contextmanager
def local_cluster() -> Generator[int]:
    """Around `ray.init` of a cluster that ends with this process; yields the port for its dashboard.

    Ray Train asks the dashboard every second whether the training is still alive. Without RAY_API_SERVER_ADDRESS its
    processes would ask the cluster that was last started on this machine: if that is gone, every training ends 12 s
    late.

    What workers say is shown as they say it. Without that, "(RayTrainWorker pid=5395)" in cyan stands before each line,
    in files, too; on one machine it tells nothing, and on a cluster with an address of its own Ray keeps to it.

    Ray announces at each start that it asks for a token, as it should; its level is raised for the start alone.
    """
    for name, value in _LOCAL.items():
        os.environ.setdefault(name, value)
    port = _free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = True
    log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield port
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


class PlainTrainer(TorchTrainer):
    """Ray Train's trainer with our own policies, that leaves Ctrl-C to Python.

    Its own handler asks the controller to abort, and waits for its answer: in vain for a minute where the controller
    waits itself, for a node. The handler also stays when the training has ended, and ends the process with code 0.

    Args:
        function: what each worker runs.
        reached: the last step that a restart would not take again; asked in Ray's processes, after a failure.
        batch: samples of a global batch, which the workers share evenly.
        options: of TorchTrainer.
    """

    def __init__(self, function: Callable[..., Any], *, reached: Callable[[], int], batch: int, **options: Any) -> None:
        super().__init__(function, **options)
        self._reached, self._batch = reached, batch

    def _register_sigint_handler(self, controller: object) -> None:
        """Nothing."""

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        config = self.run_config.failure_config or FailureConfig()
        parts["failure_policy"] = FailuresInARow(config, self._reached)
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = EvenWorkers(self.scaling_config, self._batch)
        return super()._initialize_and_run_controller(**parts)


class FailuresInARow(DefaultFailurePolicy):
    """Counts against `max_failures` the failures without progress between them. Ray counts all, however long it goes.

    Args:
        config: Ray's.
        reached: as in `PlainTrainer`.
    """

    def __init__(self, config: FailureConfig, reached: Callable[[], int]) -> None:
        super().__init__(config)
        self._ask, self._before = reached, -1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Called by Ray's controller after each failure."""
        reached = self._before
        with contextlib.suppress(OSError, UserError):  # storage that is away tells of no progress
            reached = self._ask()
        if reached > self._before:
            self._before, self._worker_group_failures = reached, 0
        return super().make_decision(training_failed_error)


class EvenWorkers(ElasticScalingPolicy):
    """As many workers as the cluster holds, of those numbers that share the global batch evenly.

    A group that starts again is only counted on nodes that answer: that one is gone Ray knows after half a minute, and
    until then it would begin to wait, for ten, for a worker there.

    Args:
        config: Ray's.
        batch: as in `PlainTrainer`.
    """

    def __init__(self, config: ScalingConfig, batch: int) -> None:
        super().__init__(config)
        self._batch, self._starts = batch, False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called by Ray's controller before a group starts."""
        self._starts = True
        try:
            return super().make_decision_for_non_running_worker_group()
        finally:
            self._starts = False

    def _count_possible_workers(self, reserved_resources: Mapping[str, dict[str, float]]) -> int:
        answering = _answering() if self._starts else {*reserved_resources}
        there = {node: have for node, have in reserved_resources.items() if node in answering}
        possible = super()._count_possible_workers(there)
        return next((count for count in range(possible, 0, -1) if self._batch % count == 0), 0)


def _answering() -> set[str]:
    """The nodes that take a connection now."""
    found = set[str]()
    for node in ray.nodes():
        place = node["NodeManagerAddress"], node["NodeManagerPort"]
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=_ANSWER_S):
            found.add(node["NodeID"])
    return found


def death(failure: Exception) -> RayActorError | None:
    """What killed a training worker, of a failure that Ray Train names; None where it has raised an error.

    Ray Train wraps the death of a process, and the loss of its node, in an exception of its own.
    """
    inner = getattr(failure, "health_check_failure", failure)
    return inner if isinstance(inner, RayActorError) else None


def quiet_training_worker() -> None:
    """Bring a training worker's log back to warnings, Python's own level.

    Ray Train sets the root logger of its workers to INFO, whatever its LoggingConfig says. Without this, each report
    is written out ("Reporting training result 1: TrainingReport(...)", by a logger that is named after its file), and
    so is what any library has to say.
    """
    logging.getLogger().setLevel(logging.WARNING)


def quiet_data(context: DataContext) -> None:
    """Ray Data without its progress bars and their announcements: the training has a progress of its own.

    Its logger for choosing a bar warns that there is none ("Progress bars disabled. To enable, ...").
    """
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class Breathe(ExecutionCallback):
    """A shortest time for each turn of Ray Data's scheduling loop.

    While its output waits to be consumed, that loop (a thread of the training worker) spins without one, and takes
    half a core and the interpreter lock from the training step.
    """

    def __init__(self) -> None:
        self._turned = time.monotonic()

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data once a turn."""
        time.sleep(max(0.0, self._turned + _TURN_S - time.monotonic()))
        self._turned = time.monotonic()


def bar(remote: bool) -> type:
    """The class of progress bars: Ray's own in a remote worker, whose terminal is that of the command.

    Plain tqdm there would come line by line, each time that the bar moves.
    """
    return tqdm_ray.tqdm if remote else tqdm.tqdm


def ahead(results: int) -> dict[str, Any]:
    """The option of a task by which it waits while this many of its streamed results are not yet taken.

    Without it, the task decodes a whole shard into Ray's object store.
    """
    return {"_generator_backpressure_num_objects": results}
