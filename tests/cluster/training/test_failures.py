"""When a training that fails is given up."""

from __future__ import annotations

from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from cluster.ray_private.train import FailuresInARow


def test_failures_are_counted_from_the_last_checkpoint_on() -> None:
    reached = [0]
    policy = FailuresInARow(FailureConfig(max_failures=1), lambda: reached[0])
    failure = WorkerGroupError("one died", {0: RuntimeError()})
    for step in range(5):
        reached[0] = step
        assert policy.make_decision(failure) == FailureDecision.RETRY
    assert policy.make_decision(failure) == FailureDecision.RAISE, "the second without progress"
