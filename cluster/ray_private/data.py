"""Ray Data: calm, in what it says and in what it takes of a core, and never far ahead of who takes its images."""

from __future__ import annotations

import logging
import time

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.resource_budget_backpressure_policy import (
    ResourceBudgetBackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
from ray.data._internal.execution.operators.base_physical_operator import InternalQueueOperatorMixin
from ray.data._internal.stats import get_or_create_stats_actor

_TURN_S = 0.05
_WAITING_A_TASK = 4  # blocks; small ones: of large ones, memory holds fewer


def quiet_data(context: DataContext) -> None:
    """Ray Data without its progress bars and their announcements: the training has a progress of its own.

    Its logger for choosing a bar warns that there is none ("Progress bars disabled. To enable, ...").
    """
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def begin_stats() -> None:
    """Start the process to which all streams of the cluster tell how they go.

    The first stream would; but what a trial of a sweep starts ends with its placement group, and the streams of the
    others, of which the next such process has never heard, show tracebacks.
    """
    get_or_create_stats_actor()


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


class Budget(ResourceBudgetBackpressurePolicy):
    """When one more task of a stage may start: there is memory for what it makes, and not much is waiting behind it.

    Ray Data's own rule bounds what waits by its bytes alone, which lets a stream of small shards run ahead by hundreds
    of them, in the seconds in which a training begins. And it asks for a share of the cores, which it counts in whole
    ones of what the training leaves; on a small cluster that is none, so that one task runs at a time. How many run at
    once is bounded by the stages and by Ray's scheduler, and a training begins when it has its cores.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Called by Ray Data before each task."""
        budget = self._resource_manager.get_budget(op)
        pending = op.metrics.obj_store_mem_max_pending_output_per_task or 0
        if budget is not None and budget.object_store_memory < pending:
            return False
        at_once = max(stage.get_max_concurrency_limit() or 1 for stage in (op, *op.output_dependencies))
        return self._waiting(op) < _WAITING_A_TASK * at_once

    def _waiting(self, op: PhysicalOperator) -> int:
        """Blocks that a stage has made and that nothing has begun to use."""
        inside = op.internal_output_queue_num_blocks() if isinstance(op, InternalQueueOperatorMixin) else 0
        taken = (self._topology[stage].total_enqueued_input_blocks() for stage in op.output_dependencies)
        return inside + sum(taken, 0 if op.output_dependencies else self._topology[op].output_queue.num_blocks)


def own_budget(context: DataContext) -> None:
    """Streams of this context start their tasks by `Budget`."""
    kept = [policy for policy in ENABLED_BACKPRESSURE_POLICIES if policy is not ResourceBudgetBackpressurePolicy]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*kept, Budget])
