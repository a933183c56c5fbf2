"""A lease on something in an object store, which knows no locks: one owner at a time, and none for ever.

Its owner writes it again every few seconds. Who finds one waits for that: an owner that is heard is named, and one that
is not is dead, and its lease taken over. No clock of one machine is compared with that of another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bld_core.errors import UserError
from bld_core.storage.files import filesystem
from bld_core.storage.patience import persist_for, time_limit

BEAT_S = 5.0
"""Seconds after which an owner writes its lease again, and others look at it again."""
BEATS = 6
"""Looks in a row that find a lease as it was, after which its owner counts as dead."""
_SETTLES_S = 1.0  # within which of two that write at once, where the store knows no conditions, both have written
_NOT_AS_ASSUMED, _UNKNOWN = 412, 501  # answers to a condition
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        id: of the lease, no two the same.
        process: its number.
        host: that it runs on.
        since: when it took the lease, in seconds since 1970, by its own clock.
        beats: how often it has written the lease again.
    """

    id: str
    process: int
    host: str
    since: float
    beats: int = 0

    def __str__(self) -> str:
        age = timedelta(seconds=max(0, int(time.time() - self.since)))
        began = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.process} on {self.host}, since {began:%Y-%m-%d %H:%M:%S} UTC, {age} ago"


class Lease:
    """The lease at one URL. Where the store knows conditional writes, no two are given it at the same time.

    Where it does not, the last of those that write at once has it, and each looks, after a moment, whether it was the
    last; one that a stall has kept from seeing that is told at its next beat.

    Args:
        url: of a file, of which there is nothing else to know.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._mine = Owner(uuid.uuid4().hex, os.getpid(), os.uname().nodename, time.time())
        self._written = False
        self._turn = threading.Lock()  # a beat under way must not write what has just been given back

    def take(self) -> Owner | None:
        """Take it; returns who holds it instead, after a beat at most. A dead owner is waited for `BEATS` beats."""
        seen = self._read(time_limit())
        if seen is not None:
            told = "%r is held by %s; waiting for a sign of life, for %g s at the most"
            _log.warning(told, self._url, seen[0], BEAT_S * BEATS)
            for _ in range(BEATS):
                time.sleep(BEAT_S)
                found = self._read(time_limit())
                if found is None:
                    return self.take()
                if found[0] != seen[0]:
                    return found[0]
        self._mine = replace(self._mine, since=time.time())
        self._write(seen, time_limit())
        time.sleep(_SETTLES_S)
        found = self._read(time_limit())
        if found is None:
            return self.take()
        return None if found[0].id == self._mine.id else found[0]

    def beat(self) -> Owner | None:
        """Show that its owner is alive; returns who has taken it over.

        That storage is away, or refuses, is no reason to end.
        """
        with self._turn, contextlib.suppress(UserError):
            if self._written:
                found = self._read(BEAT_S)
                if found is not None and found[0].id != self._mine.id:
                    return found[0]
                self._mine = replace(self._mine, beats=self._mine.beats + 1)
                self._write(found, BEAT_S)
        return None

    def release(self) -> None:
        """Give it back, if it is held. Where that fails, it runs out."""
        with self._turn, contextlib.suppress(UserError):
            if self._written and (found := self._read(BEAT_S)) is not None and found[0].id == self._mine.id:
                fs, path = filesystem(self._url)
                persist_for(BEAT_S, f"delete {self._url!r}", fs.rm_file, path)
            self._written = False

    def _read(self, seconds: float) -> tuple[Owner, str] | None:
        """Who holds it, and the store's name for this very content; None where nobody does."""
        fs, path = filesystem(self._url)

        def attempt() -> tuple[Owner, str] | None:
            fs.invalidate_cache()
            try:
                tag = str(fs.info(path).get("ETag", ""))  # before the content: newer content never has an older tag
                return Owner(**json.loads(fs.cat_file(path))), tag
            except FileNotFoundError:
                return None

        return persist_for(seconds, f"read {self._url!r}", attempt)

    def _write(self, seen: tuple[Owner, str] | None, seconds: float) -> None:
        """Write it as its owner, if it still is as it was seen; that it was not, the next look tells."""
        place: tuple[Any, str] = filesystem(self._url)
        fs, path = place
        data = json.dumps(asdict(self._mine)).encode()

        def put(**condition: str) -> None:
            if "s3" in fs.protocol:
                bucket, _, key = path.partition("/")
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            else:
                fs.pipe_file(path, data)

        def attempt() -> None:
            try:
                put(**({"IfMatch": seen[1]} if seen else {"IfNoneMatch": "*"}))
            except OSError as error:
                answer = _status(error)
                if answer == _UNKNOWN:
                    put()
                elif seen is not None and isinstance(error, FileNotFoundError):
                    pass  # given back since it was seen
                elif answer != _NOT_AS_ASSUMED:
                    raise

        self._written = True
        persist_for(seconds, f"write {self._url!r}", attempt)


def _status(error: OSError) -> int:
    """What an S3 server answered; 0 of an error that is no answer."""
    answer: Any = getattr(error.__cause__, "response", None)
    return answer["ResponseMetadata"].get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0
