"""Nodes that the work waits for, or is watched on: what is missing is said, and waited for as long as it may be."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from datetime import datetime

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.storage.patience import time_limit
from cluster.nodes.placement import ROUNDING, Bundle, Need, Resources, cluster_has, cluster_has_free, reserve
from cluster.ray_private.autoscaler import growth

_log = logging.getLogger(__name__)
LOOK_S = 5.0
"""Seconds between two looks."""
_SAY_S = 30.0
_SETTLES_S = 3.0  # within which Ray counts as free what has just ended
_TURN_S = 0.2
_ACCESS_S = 60.0
_ACCESS_TRIES_S = 10.0  # for which a node asks a storage that does not answer
_OF_STORAGE = ("AWS_", "FSSPEC_", "GOOGLE_", "HF_")  # variables that clients of storage read


def check_access(urls: Sequence[str]) -> None:
    """Have each node look for what its workers are to read and write, before the work begins.

    What this process is given by variables, keys above all, its workers do not get: Ray writes down what it hands on.

    Args:
        urls: files and folders that this process can reach.

    Raises:
        UserError: a node cannot reach one of them; its message names, without values, the variables that are set here
            and not there.
    """
    set_here = [name for name in os.environ if name.startswith(_OF_STORAGE)]
    asked = {
        _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            list(urls), set_here
        ): node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ACCESS_S)
    for answer in answered:
        fault, missing = ray.get(answer)
        if fault:
            lacks = f"it lacks {', '.join(missing)}, which are set here: set them" if missing else "mend that"
            raise UserError(
                f"node {asked[answer]} cannot reach what its workers need: {fault}; {lacks} where `ray start` runs on "
                "it, and start it again"
            )


@ray.remote(num_cpus=0)
def _look(urls: list[str], names: list[str]) -> tuple[str, list[str]]:
    """What keeps this node from the first of the URLs that it cannot reach, and which of the variables it lacks."""
    missing = [name for name in names if name not in os.environ]
    patience = os.environ.get("BLD_STORAGE_SECONDS")
    os.environ["BLD_STORAGE_SECONDS"] = str(min(time_limit(), _ACCESS_TRIES_S))
    try:
        for url in urls:
            if not files.exists(url) and files.is_local(url):  # an empty folder of an object store is not there
                return f"{url!r} is not there, and must be a place that all nodes share", missing
    except (OSError, UserError) as error:
        return str(error), missing
    finally:
        if patience is None:
            del os.environ["BLD_STORAGE_SECONDS"]
        else:
            os.environ["BLD_STORAGE_SECONDS"] = patience
    return "", missing


def wait_until_held(
    check: Callable[[], None], seconds: float, bundles: Sequence[Bundle] = (), patience: float = 0.0
) -> None:
    """Wait for nodes that are yet to join a cluster that is too small for the work.

    Args:
        check: raises a UserError that says what is missing.
        seconds: to wait for nodes that somebody starts; with 0 it is looked once.
        bundles: what the work needs, each on one node: an autoscaler, where the cluster has one, is asked for it.
        patience: seconds to wait for an autoscaler.

    Raises:
        UserError: of the last check; also where the autoscaler can never make what is missing.
    """
    if (error := _refusal(check)) is None:
        return
    began, since, said = time.monotonic(), f"{datetime.now():%H:%M:%S}", 0.0
    # A group that waits is what an autoscaler grows for, and is gone with this command; a request would be for ever.
    group = reserve(bundles) if bundles and growth() is not None else None
    limit = seconds if group is None else max(seconds, patience)
    try:
        while error is not None:
            now = time.monotonic()
            left = began + limit - now
            if left <= 0:
                raise error
            if now - said >= LOOK_S:
                said = now
                _say(f"waiting for nodes, since {since}, for {left:.0f} s more: {_grown(error, group, seconds)}")
            time.sleep(_TURN_S)
            error = _refusal(check)
    finally:
        if group is not None:
            remove_placement_group(group)


def _refusal(check: Callable[[], None]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def _grown(error: UserError, group: PlacementGroup | None, seconds: float) -> str:
    """What is missing, and what the autoscaler does about it.

    Raises:
        UserError: it never can, where nobody else holds anything, and nobody was said to start nodes by hand.
    """
    found = growth(group) if group is not None else None
    if found is not None and found.impossible and not found.coming and not seconds and _idle():
        raise UserError(
            f"{error}; and its autoscaler has no kinds of nodes, or too few of them, that would hold it"
        ) from error
    doing = f"; {found}" if found is not None and str(found) else ""
    address = ray.get_runtime_context().gcs_address
    return f"{error}{doing}; `ray status --address={address}` shows what is there"


def _idle() -> bool:
    """Whether nobody holds a core or GPU of the cluster."""
    have, free = cluster_has(), cluster_has_free()
    return all(free[kind] >= have[kind] - ROUNDING for kind in have)


def say_if_busy(need: Need, free: Callable[..., Resources]) -> None:
    """Say what the work waits for, where others hold it now.

    Args:
        need: of the work.
        free: asks the cluster what nobody holds, as `cluster_has_free`.
    """
    deadline = time.monotonic() + _SETTLES_S
    while busy := need.missing(free):
        if time.monotonic() >= deadline:
            _say(f"waiting: of what the work needs {busy} are free; others hold the rest until they end")
            return
        time.sleep(_TURN_S)


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
        missing = self._need.missing(cluster_has)
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


def node_name() -> str:
    """Which node this process runs on: its address, and the beginning of Ray's id, as several may be on a machine."""
    return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"


def died(who: str, times: int, error: RayError, how: str = "died") -> UserError:
    """What to tell of a worker whose process, or node, has died more often than it may.

    Args:
        who: has died.
        times: one more than `cluster.max_failures`.
        error: of the last time, as Ray says it.
        how: what has happened to it.
    """
    said = str(error)
    reason = re.search(r"because ([^.\n]+)", said)
    node = re.search(r"\bip: (\S+)", said)
    where = f" on node {node[1]}" if node else ""
    return UserError(
        f"{who} {how} {times} {'time' if times == 1 else 'times'}, at last{where}, as "
        f"{reason[1] if reason else said.splitlines()[0]}; cluster.max_failures is {times - 1}: see whether that node "
        "is there and has memory enough, or raise it, then run the same command again, which goes on where it stopped"
    )


@contextlib.contextmanager
def nodes_watched(need: Need, patience: float) -> Generator[None]:
    """Watch the cluster while the main thread waits for Ray; elsewhere, nobody watches.

    Raises:
        UserError: what is gone has not come back in time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ended_by(Watch(need, patience).look, LOOK_S):
        yield


@contextlib.contextmanager
def ended_by(look: Callable[[], UserError | None], seconds: float) -> Generator[None]:
    """Look every so many seconds, beside the block, whether it must end: at once if the main thread is in it.

    In other threads, which nothing interrupts, the block ends so when it is over.

    Args:
        look: returns why; None where it may go on.
        seconds: between two looks.

    Raises:
        UserError: what the look has returned.
    """
    over, turn, ended = threading.Event(), threading.Lock(), list[UserError]()
    here = threading.current_thread()
    main = here is threading.main_thread()

    def work() -> None:
        while not over.wait(seconds):
            try:
                failure = look()
            except Exception:  # the next look may do better; without any, nobody would know
                _log.exception("a look at what this process depends on has failed")
                continue
            if failure is not None:
                ended.append(failure)
                with turn:
                    if main and not over.is_set():  # a real one, which ends a system call, too
                        signal.pthread_kill(here.ident or 0, signal.SIGUSR2)
                return

    # A signal of its own: a job in the background may have been told to ignore that of Ctrl-C.
    before = signal.signal(signal.SIGUSR2, signal.default_int_handler) if main else None
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
        if ended:
            raise ended[0]
    except KeyboardInterrupt:
        if ended:
            raise ended[0] from None
        raise
    finally:
        with turn:
            over.set()
        if main:
            signal.signal(signal.SIGUSR2, before)


def _nodes() -> dict[str, str]:
    """The nodes that are alive: where each is, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # not print, which Ray Train would repeat in its own log
    sys.stderr.flush()
