"""Ray Data: calm, in what it says and in what it takes of a core."""

from __future__ import annotations

import logging
import time

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

_TURN_S = 0.05


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
