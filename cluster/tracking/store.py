"""MLflow's store, a server or a database: created once, asked once whether it is there, and then waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NoReturn, TypeVar

from filelock import UnixFileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from bld_core.errors import UserError
from cluster.secrets import without_secrets

T = TypeVar("T")

# MLflow's own retries, of HTTP alone, are switched off but for one: `patiently` and the outbox know all stores.
_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_ASKED = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
_CONNECT_S = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_FIRST_USE_S = 20.0
# What a store says of a request that is wrong, now and later.
_REFUSED = {
    *("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "NOT_FOUND"),
}
# What SQLite says that waiting does not mend.
_STAYS = ("disk is full", "readonly database", "unable to open", "no such table", "malformed")
_USERS = {name for name in _HTTP if name in os.environ}
_answered: set[str] = set()
_opening = threading.Lock()
_log = logging.getLogger(__name__)


class StoreError(UserError, ConnectionError):
    """A store that refuses, is full, away, or gone."""


FAILURES = (MlflowException, SQLAlchemyError, OSError)
"""What a store raises that is away, full, gone, or refuses."""


def open_client(uri: str, patience: float = 480.0) -> MlflowClient:
    """A client of a tracking store, also of its registry.

    The first time in a process, the store is asked once whether it is there, for seconds alone: patience is for a store
    that was there. A SQLite file that is yet to be made is made by one process, while others wait.

    Args:
        uri: tracking URI.
        patience: seconds to wait for a SQLite file that is there and that another process works on.

    Raises:
        UserError: no such store, or one that cannot be used, or no longer there.
    """
    file = database_file(uri)
    if file is not None:  # each request opens it anew: a file that is moved away and back is noticed
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    for name, value in _HTTP.items():
        os.environ.setdefault(name, value)
    # Making or renewing a database is told step by step at INFO, and each failure of one with a traceback of pages.
    for library, level in {
        "mlflow": logging.WARNING,
        "alembic": logging.WARNING,
        "mlflow.store.db.utils": logging.CRITICAL,
        "urllib3.connectionpool": logging.ERROR,
    }.items():
        logging.getLogger(library).setLevel(level)
    with _opening:
        if uri not in _answered:
            try:
                _ask(uri, patience)
            except (*FAILURES, ModuleNotFoundError) as error:
                refuse(uri, error)
            _answered.add(uri)
        elif file is not None and not file.exists():  # SQLite would make an empty one
            raise StoreError(f"{file} was there, and is gone: put it back")
    return MlflowClient(uri)


def known_to_be_there(uri: str) -> None:
    """Trust a store that another process of the same command has asked: be patient from the first request on."""
    _answered.add(uri)


def database_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for any other store."""
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


@contextlib.contextmanager
def http_settings(**settings: str) -> Generator[None]:
    """MLflow's variables for requests of a kind, unless the user has set them."""
    before = {name: os.environ[name] for name in settings if name not in _USERS}
    os.environ.update({name: settings[name] for name in before})
    try:
        yield
    finally:
        os.environ.update(before)


def _ask(uri: str, patience: float) -> None:
    """See that the store is there; a database that is new or of an older MLflow may be made or renewed by that."""
    if uri.startswith("http"):
        with http_settings(**_ASKED):
            MlflowClient(uri).search_experiments(max_results=1)
    elif (file := database_file(uri)) is not None:
        _open_file(uri, file, patience)
    elif "://" in uri and not uri.startswith("databricks"):
        url = make_url(uri)
        if url.host:
            socket.create_connection((url.host, url.port or _PORTS[url.get_backend_name()]), _CONNECT_S).close()
        # Of two that make the tables at the same time, one fails and finds them made a moment later.
        patiently(uri, _FIRST_USE_S, lambda: MlflowClient(uri))


def _open_file(uri: str, file: Path, patience: float) -> None:
    """Open a SQLite file by one process at a time: MLflow makes its tables in steps that two cannot take at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with UnixFileLock(f"{file}.lock", patience, fallback_to_soft=False), _no_stray_folder(uri, file):
        if not file.exists():
            _make(uri, file)
        patiently(uri, patience, lambda: MlflowClient(uri))


def _make(uri: str, file: Path) -> None:
    """Make a database under another name: one that a kill or a full disk leaves half-made, no MLflow can finish."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    new_uri = make_url(uri).set(database=str(new)).render_as_string()
    try:
        with _no_stray_folder(new_uri, new):
            MlflowClient(new_uri)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _no_stray_folder(uri: str, file: Path) -> Generator[None]:
    """MLflow also makes the folder that a SQLite file would be in if its escaped name were its name: an empty one."""
    stray = Path(uri.partition(":///")[2]).parent
    there = stray.exists()
    try:
        yield
    finally:
        if not there and stray != file.parent and stray.exists():
            os.removedirs(stray)


def _passes(error: BaseException) -> bool:
    """Whether the same request to a store may succeed later, without anybody's doing."""
    if isinstance(error, StoreError) and error.__cause__ is not None:
        return _passes(error.__cause__)
    if isinstance(error, MlflowException) and error.error_code in _REFUSED:
        return False
    passing = isinstance(error, (MlflowException, OperationalError, InterfaceError, OSError))
    return passing and not any(words in str(error) for words in _STAYS)


def patiently(uri: str, seconds: float, attempt: Callable[[], T]) -> T:
    """Ask something of a store that was there, until it answers.

    Args:
        uri: tracking URI.
        seconds: for how long.
        attempt: asks; safe to do again.

    Raises:
        UserError: the store refuses, or has been away for so long.
    """

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            _log.warning(
                "MLflow at %s is away (%s); waiting for it for up to %g s",
                without_secrets(uri),
                reason(state.outcome.exception()),
                seconds,
            )

    retrying = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.5, max=15),
        before_sleep=say,
    )
    try:
        return retrying(attempt)
    except RetryError as error:
        failure = error.last_attempt.exception()
        assert failure is not None, "only failures are tried again"
        refuse(uri, failure)
    except FAILURES as error:
        refuse(uri, error)


@contextlib.contextmanager
def plain_errors(uri: str) -> Generator[None]:
    """What MLflow refuses, or cannot do because its server stays away, is a UserError that says where, why, what now.

    Args:
        uri: tracking URI.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        refuse(uri, error)


def reason(error: BaseException | None) -> str:
    """The first line of what a store says, without secrets."""
    if isinstance(error, StoreError) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in without_secrets(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def refuse(uri: str, error: BaseException) -> NoReturn:
    """Say of a store that it does not do its work: where, why, what now.

    Raises:
        StoreError: always.
    """
    if isinstance(error, StoreError):
        raise error
    raise _refusal(uri, error) from error


def _refusal(uri: str, error: BaseException) -> StoreError:
    where = without_secrets(uri)
    if "disk is full" in str(error):
        return StoreError(
            f"MLflow cannot write to its database {where}: {reason(error)}; free space where it lies, or set "
            "tracking.uri to another place, then run the same command again, which goes on where it stopped"
        )
    return StoreError(
        f"MLflow at {where} refused or was away: {without_secrets(str(error))}; check the settings of "
        "`tracking`, that the server or database is there, and the variables MLFLOW_TRACKING_*, which hold credentials"
    )
