"""Ray Train: a trainer with our own policies, and what it says of workers that died."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayActorError
from ray.train import FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    ScalingDecision,
    autoscaling_coordinator_client,
)
from ray.train.v2.api.callback import RayTrainCallback

from bld_core.errors import UserError
from cluster.nodes.labels import matches
from cluster.ray_private.core import without_dashboard

_ANSWER_S = 3.0
# The controller, which imports this, waits 5 s for another of Ray's processes; on a busy machine that one has not even
# started then, and a warning with a traceback is shown.
autoscaling_coordinator_client.AUTOSCALING_REQUESTS_GET_TIMEOUT_S = 30


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

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Ray's own, without the process that asks the dashboard every second whether the controller is alive.

        It frees what a dead one has reserved, as those of a sweep's trials that end early. The cluster of a command
        that trains once has no dashboard, where it would ask in vain, and ends with the command.
        """
        callbacks = super()._create_default_callbacks()
        if not without_dashboard():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

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
    until then it would begin to wait, for ten, for a worker there. With a label selector, only on nodes that match,
    and there on all of their cores: what other work of this kind holds is not seen.

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
        if selector := self.scaling_config.label_selector:  # Ray reserves whatever the labels, perhaps where none is
            assert isinstance(selector, dict), "all workers have the same"
            reserved_resources = {
                node["NodeID"]: node["Resources"]
                for node in ray.nodes()
                if node["Alive"] and matches(node["Labels"], selector)
            }
        answering = _answering() if self._starts else {*reserved_resources}
        there = {node: have for node, have in reserved_resources.items() if node in answering}
        possible = super()._count_possible_workers(there)
        return next((count for count in range(possible, 0, -1) if self._batch % count == 0), 0)


def _answering() -> set[str]:
    """The nodes that take a connection now, and of which there is no notice that they will go."""
    found, leaving = set[str](), state.get_draining_nodes()
    for node in ray.nodes():
        if node["NodeID"] in leaving:
            continue
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


def quiet_training() -> None:
    """Ray Train's warnings alone, in a process where Ray, and with it its logging, has not been started."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def quiet_training_worker() -> None:
    """Bring a training worker's log back to warnings, Python's own level.

    Ray Train sets the root logger of its workers to INFO, whatever its LoggingConfig says. Without this, each report
    is written out ("Reporting training result 1: TrainingReport(...)", by a logger that is named after its file), and
    so is what any library has to say.
    """
    logging.getLogger().setLevel(logging.WARNING)
