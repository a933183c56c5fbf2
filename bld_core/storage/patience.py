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

from bld_core.errors import MissingError, UserError
from bld_core.storage.addresses import without_secrets

T = TypeVar("T")

# Seconds: up to 0.2, 0.4, 0.8, ..., 5, at least half of them.
_wait = wait_exponential(multiplier=0.1, max=2.5) + wait_random_exponential(multiplier=0.1, max=2.5)
_TRIES_BEFORE_A_WORD = 4
# s3fs turns what a server answers into OSErrors: 409 and 503 into EBUSY, 500 into EREMOTEIO, 502 and 504 into EIO.
_PASSING = {errno.EBUSY, errno.EREMOTEIO, errno.EIO}
_log = logging.getLogger(__name__)


class StorageError(UserError, ConnectionError):
    """Remote storage that failed, for passing reasons, for as long as it was given; or changed while it was read."""


class DeniedError(UserError, PermissionError):
    """Storage that is there, but not for this user."""


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
        DeniedError: the user may not.
    """
    return persist_for(time_limit(), what, attempt, *arguments, **settings)


def persist_for(limit: float, what: str, attempt: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """The same with another time limit, in seconds, for what is not worth waiting for so long."""

    def say(state: RetryCallState) -> None:
        if state.attempt_number == _TRIES_BEFORE_A_WORD and state.outcome:
            _log.warning("cannot %s (%r); trying for up to %g s", what, state.outcome.exception(), limit)

    retrying = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_delay(limit),
        wait=lambda state: min(_wait(state), limit - (state.seconds_since_start or 0.0)),  # a last try at the limit
        before_sleep=say,
    )

    def honest() -> T:
        try:
            return attempt(*arguments, **settings)
        except FileNotFoundError as error:
            raise _reason(error) from None

    try:
        return retrying(honest)
    except RetryError as error:
        tries, failure = error.last_attempt.attempt_number, error.last_attempt.exception()
        seconds = retrying.statistics["delay_since_first_attempt"]
        raise StorageError(
            f"cannot {without_secrets(what)}: tried {tries} times in {seconds:.0f} s, at last: "
            f"{without_secrets(repr(failure))}; check the server, its address (AWS_ENDPOINT_URL) and the network, then "
            "run the same command again, which goes on where it stopped; BLD_STORAGE_SECONDS is how long to try"
        ) from _public(failure)
    except FileNotFoundError as error:
        if _public(error) is not None:
            raise
        raise MissingError(without_secrets(f"cannot {what}: it is not there ({error})")) from None
    except Exception as error:
        if isinstance(error, UserError) or (refusal := _refusal(error)) is None:
            raise
        denied, said, remedy = refusal
        kind = DeniedError if denied else StorageError
        raise kind(without_secrets(f"cannot {what}: {said}; {remedy}")) from _public(error)


def _public(error: BaseException | None) -> BaseException | None:
    """An error that may stand in a log: one that names no secret."""
    return error if without_secrets(repr(error)) == repr(error) else None


def _reason(error: FileNotFoundError) -> BaseException:
    """What is behind a file that is not found: of a web server, fsspec says so whatever has gone wrong."""
    import aiohttp

    cause = error.__cause__
    known = isinstance(cause, (aiohttp.ClientError, TimeoutError)) and getattr(cause, "status", 0) not in (404, 410)
    return cause if known and cause is not None else error


_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, where there is one) here and on every "
    "node, or FSSPEC_S3_ANON=true for what is public"
)
_REMEDIES = {  # of what S3 says
    "ExpiredToken": f"the credentials have expired: renew them, then {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the server does not know that key: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is another one's: {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_DEFAULT_REGION to that one",
    "PermanentRedirect": "the bucket lies in another region: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
    "301": "the bucket lies in another region: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
    "400": f"expired credentials and a wrong region are answered so: {_CREDENTIALS}; and AWS_DEFAULT_REGION",
    "403": f"this user may not, or its clock or its credentials are wrong: check the rights; {_CREDENTIALS}",
    "AccessDenied": f"this user may not: ask for the right to read, or {_CREDENTIALS}",
}


def _refusal(error: Exception) -> tuple[bool, str, str] | None:
    """Whether this user may not, what the server said, and what to do; None of an error that is no refusal."""
    import aiohttp
    from botocore import exceptions

    answer: Any = error if isinstance(error, exceptions.ClientError) else error.__cause__
    if isinstance(answer, exceptions.ClientError):
        said = answer.response.get("Error", {})
        code = str(said.get("Code", ""))
        denied = isinstance(error, PermissionError) or code in _REMEDIES
        text = f"the server said {code} {said.get('Message', '')}".strip()
        return denied, text, _REMEDIES.get(code, "check the address, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return True, f"there are no credentials ({error})", _CREDENTIALS
    if isinstance(error, exceptions.BotoCoreError):
        return False, f"{error}", "check the AWS_* variables"
    if isinstance(error, aiohttp.ClientResponseError):
        said = f"the server said {error.status} {error.message}".strip()
        denied = error.status in (401, 403, 407)
        remedy = "give a signed link, or renew it if it has expired" if denied else "check the address"
        return denied, said, remedy
    if isinstance(error, PermissionError):
        return True, f"{error}", "check credentials and permissions"
    return None


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
        answer: Any = getattr(error.__cause__, "response", None)  # of botocore; s3fs takes codes that it does not know
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) if isinstance(answer, dict) else 500
        return status >= 500 or status in (408, 409, 429)  # for EIO, whoever is to blame
    return isinstance(error, (ConnectionError, TimeoutError, *_broken()))
