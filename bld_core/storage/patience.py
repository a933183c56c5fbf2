"""Patience with remote storage: what fails for a passing reason is tried again, and not for ever.

In this one place: the clients' own retries, which count attempts and know no time limit, are switched off.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, stop_after_delay
from tenacity.wait import wait_exponential, wait_random_exponential

from bld_core.errors import UserError

T = TypeVar("T")

# Seconds: up to 0.2, 0.4, 0.8, ..., 5, at least half of them.
_wait = wait_exponential(multiplier=0.1, max=2.5) + wait_random_exponential(multiplier=0.1, max=2.5)
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
    limit = time_limit()

    def say(state: RetryCallState) -> None:
        if state.attempt_number == _TRIES_BEFORE_A_WORD and state.outcome:
            _log.warning("cannot %s (%r); trying for up to %g s", what, state.outcome.exception(), limit)

    retrying = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_delay(limit),
        wait=lambda state: min(_wait(state), limit - (state.seconds_since_start or 0.0)),  # a last try at the limit
        before_sleep=say,
    )
    try:
        return retrying(attempt, *arguments, **settings)
    except RetryError as error:
        tries, failure = error.last_attempt.attempt_number, error.last_attempt.exception()
        seconds = retrying.statistics["delay_since_first_attempt"]
        raise StorageError(
            f"cannot {what}: tried {tries} times in {seconds:.0f} s, at last: {failure!r}; check the server, its "
            "address (AWS_ENDPOINT_URL) and the network, then run the same command again, which goes on where it "
            "stopped; BLD_STORAGE_SECONDS is how long to try"
        ) from failure


@functools.cache
def _broken() -> tuple[type[Exception], ...]:
    """Errors of the clients beneath fsspec, most of which are not OSErrors."""
    import aiohttp
    from botocore import exceptions, parsers

    return (
        *(exceptions.ConnectionError, exceptions.HTTPClientError, parsers.ResponseParserError),
        *(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError),
    )


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    known = isinstance(error, (OSError, *_broken()))
    if not known or isinstance(error, (FileNotFoundError, PermissionError, StorageError)):
        return False
    status = getattr(error, "status", None)  # of aiohttp: what an HTTP server answered
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, OSError) and error.errno in _PASSING:
        return True
    return isinstance(error, (ConnectionError, TimeoutError, *_broken()))
