"""What MLflow is yet to be told: kept in order, in small files where it can be, until its store is there to take it."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from bld_core.storage import files
from cluster.tracking.store import FAILURES, reason

Note = dict[str, Any]
"""One thing to tell, as JSON: see `Run`."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0
_log = logging.getLogger(__name__)


class Outbox:
    """Notes to a store on their way: told at once, or kept and told later, each once and in the order they were put.

    Args:
        folder: where notes are kept, a file each, for this process or a later one; it is made when the first one is.
        tell: tells the store a note; may be called again with the same.
        where: the store, for messages.
    """

    def __init__(self, folder: str, tell: Callable[[Note], None], where: str) -> None:
        self._folder, self._tell, self._where = folder, tell, where
        self._in_memory: list[Note] = []  # those that found no place in a file: that disk is full, too
        self._in_files: bool | None = None  # not known before the first look
        self._away_since: datetime | None = None
        self._pause, self._next_try = _FIRST_PAUSE, 0.0

    @property
    def waits(self) -> bool:
        """Whether notes wait."""
        if self._in_files is None:
            self._in_files = bool(self._names())
        return self._in_files or bool(self._in_memory)

    def look_again(self) -> None:
        """Look for what another process has kept since the last look: a training worker, for its driver."""
        self._in_files = None

    def put(self, note: Note) -> None:
        """Tell the store a note, or keep it."""
        if self.waits and time.monotonic() >= self._next_try:
            self.send()
        if not self.waits:
            failure = self._try(note)
            if failure is None:
                return
            self._pause_after(failure)
        self._keep(note)

    def send(self) -> Exception | None:
        """Tell what waits, now; returns why some of it still does."""
        told = 0
        for name in self._names():
            url = files.join(self._folder, name)
            try:
                note = files.read_json(url)
            except FileNotFoundError:  # another process has told it: who ends a trial, and the trial itself
                continue
            except ValueError as error:
                _log.warning("%s is damaged (%s): what it was to tell MLflow is not told; delete it", url, error)
                continue
            failure = self._try(note)
            if failure is not None:
                self._pause_after(failure)
                return failure
            files.remove(url)
            told += 1
        self._in_files = False
        while self._in_memory:
            failure = self._try(self._in_memory[0])
            if failure is not None:
                self._pause_after(failure)
                return failure
            del self._in_memory[0]
            told += 1
        if told:
            _log.warning("MLflow at %s is there again: it was told the %d notes that waited", self._where, told)
        self._away_since, self._pause = None, _FIRST_PAUSE
        return None

    def _try(self, note: Note) -> Exception | None:
        try:
            self._tell(note)
        except FAILURES as error:
            if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":  # a fault of ours
                raise
            return error
        return None

    def _pause_after(self, failure: Exception) -> None:
        """Ask no more for a while: an attempt may take half a minute of the training's time."""
        if self._away_since is None:
            self._away_since = datetime.now()
            _log.warning(
                "MLflow at %s is away since %s (%s); the work goes on, what it is to be told waits in %s",
                self._where,
                self._away_since.strftime("%H:%M:%S"),
                reason(failure),
                self._folder,
            )
        self._next_try = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _keep(self, note: Note) -> None:
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"  # sorts by time
        if not self._in_memory:
            try:
                files.write_bytes(files.join(self._folder, name), json.dumps(note).encode())
            except OSError as error:
                _log.warning("%s cannot be written (%s): notes to MLflow are kept in memory", self._folder, error)
            else:
                self._in_files = True
                return
        self._in_memory.append(note)

    def _names(self) -> list[str]:
        if not files.exists(self._folder):
            return []
        return [name for name in files.listing(self._folder) if name.endswith(".json")]
