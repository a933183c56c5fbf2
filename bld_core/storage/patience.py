"""Patience with remote storage: what fails for a passing reason is tried again, and not for ever.

In this one place: the clients' own retries, which count attempts and know no time limit, are switched off.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from bld_core.errors import UserError

T = TypeVar("T")

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_TRIES_BEFORE_A_WORD = 4
# s3fs turns what a server answers into OSErrors: 409 and 503 into EBUSY, 500 into EREMOTEIO, 502 and 504 into EIO.
_PASSING = {errno.EBUSY, errno.EREMOTEIO, errno.EIO}
_log = logging.getLogger(__name__)


class StorageError(UserError, ConnectionError):
    """Remote storage that failed, for passing reasons, for as long as it was given."""


def time_limit() -> float:
    """Seconds that remote storage may go on failing before that is an error: BLD_STORAGE_SECONDS, 120 by default.

    Raises:
        UserError: the variable is not a number above 0.
    """
    text = os.environ.get("BLD_STORAGE_SECONDS", "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"BLD_STORAGE_SECONDS is {text!r}; it must be a number of seconds above 0")
    return seconds


def persist(what: str, attempt: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Do something until it succeeds, waiting longer each time, as long as what fails may pass.

    That is: no connection, or one that breaks off or falls silent; an answer that makes no sense; too many requests
    (429, 503) or a fault within the server (500, 502, 504). Anything else, a missing file or permission above all, is
    raised at once.

    Args:
        what: what is tried, as the end of "cannot ...".
        attempt: does it; safe to do again after it has failed half-way.
        arguments: of the attempt.
        settings: of the attempt, by name.

    Raises:
        StorageError: the time limit is over.
    """
    began = time.monotonic()
    limit = time_limit()
    for tries in itertools.count(1):
        try:
            return attempt(*arguments, **settings)
        except OSError as error:
            failure = error
        except _broken() as error:
            failure = error
        if not _passes(failure):
            raise failure
        tried = time.monotonic() - began
        if tried >= limit:
            raise StorageError(
                f"cannot {what}: tried {tries} times in {tried:.0f} s, at last: {failure!r}; check the server, its "
                "address (AWS_ENDPOINT_URL) and the network, then run the same command again, which goes on where it "
                "stopped; BLD_STORAGE_SECONDS is how long to try"
            ) from failure
        if tries == _TRIES_BEFORE_A_WORD:
            _log.warning("cannot %s (%r); trying for up to %g s", what, failure, limit)
        wait = min(_FIRST_WAIT_S * 2**tries, _LONGEST_WAIT_S) * random.uniform(0.5, 1)
        time.sleep(min(wait, limit - tried))
    raise AssertionError("the loop ends only by return or raise")


@functools.cache
def _broken() -> tuple[type[Exception], ...]:
    """Errors of the clients beneath fsspec, most of which are not OSErrors."""
    import aiohttp
    from botocore import exceptions, parsers

    return (
        *(exceptions.ConnectionError, exceptions.HTTPClientError, parsers.ResponseParserError),
        *(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError),
    )


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, (FileNotFoundError, PermissionError, StorageError)):
        return False
    status = getattr(error, "status", None)  # of aiohttp: what an HTTP server answered
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, OSError) and error.errno in _PASSING:
        return True
    return isinstance(error, (ConnectionError, TimeoutError, *_broken()))
