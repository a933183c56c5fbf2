"""Nodes that are gone: said soon and again, and waited for, but not without end."""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime

import ray

from bld_core.errors import UserError

LOOK_S = 5.0
"""Seconds between two looks."""
_SAY_S = 30.0


@dataclass(frozen=True)
class Need:
    """What the work needs of the cluster at the same time."""

    cpus: float
    gpus: int

    def missing(self) -> str:
        """What the cluster lacks now, in words; "" where it has all."""
        have = ray.cluster_resources()
        kinds = [("CPU cores", self.cpus, have.get("CPU", 0.0)), ("GPUs", self.gpus, have.get("GPU", 0.0))]
        return " and ".join(f"{there:g} of {need:g} {kind}" for kind, need, there in kinds if there < need)


class Watch:
    """Looks now and then whether the cluster still holds the work.

    Args:
        need: of the work; the cluster held it when the watch began.
        patience: seconds to wait for what is gone.
    """

    def __init__(self, need: Need, patience: float) -> None:
        self._need, self._patience = need, patience
        self._nodes = _nodes()
        self._looked, self._gone, self._said = time.monotonic(), 0.0, 0.0
        self._since = ""

    def look(self) -> UserError | None:
        """Say what is missing; returns the end of all waiting, when it has come. Quick, and may be called often."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return None
        self._looked = now
        missing = self._need.missing()
        if not missing:
            self._nodes |= _nodes()
            if self._since:
                _say(f"the nodes are back after {now - self._gone:.0f} s; the work goes on")
                self._since = ""
            return None
        if not self._since:
            self._gone, self._said, self._since = now, now - _SAY_S, f"{datetime.now():%H:%M:%S}"
        here = _nodes()
        lost = [address for node, address in self._nodes.items() if node not in here]
        state = f"the Ray cluster has {missing} that the work needs, since {self._since}"
        state += f": no more of {', '.join(lost)}" if lost else ""
        if now - self._gone >= self._patience:
            return UserError(
                f"{state}; cluster.patience is {self._patience:g} s: bring the nodes back, or lower cluster.workers, "
                "and run the same command again, which goes on where it stopped"
            )
        if now - self._said >= _SAY_S:
            self._said = now
            _say(f"waiting: {state}; for {self._patience - (now - self._gone):.0f} s more")
        return None


@contextlib.contextmanager
def nodes_watched(need: Need, patience: float) -> Generator[None]:
    """Watch the cluster while the main thread waits for Ray; elsewhere, nobody watches.

    Raises:
        UserError: what is gone has not come back in time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch, over, ended = Watch(need, patience), threading.Event(), list[UserError]()

    def work() -> None:
        while not over.wait(LOOK_S):
            if (failure := watch.look()) is not None:
                ended.append(failure)
                _thread.interrupt_main()
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if ended:
            raise ended[0] from None
        raise
    finally:
        over.set()


def _nodes() -> dict[str, str]:
    """The nodes that are alive: where each is, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # not print, which Ray Train would repeat in its own log
    sys.stderr.flush()
