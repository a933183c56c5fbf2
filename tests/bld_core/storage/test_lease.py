"""Leases on two real S3 servers: one that knows conditional writes, and one that does not."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from moto.server import ThreadedMotoServer

import bld_core.storage.lease as storage_lease
from bld_core.storage import files
from bld_core.storage.lease import Lease
from tests.servers import S3Server


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of a server that answers 412 to a write whose condition does not hold."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["moto", "rclone"])
def url(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a lease that nobody holds; beats are short."""
    monkeypatch.setattr(storage_lease, "BEAT_S", 0.2)
    monkeypatch.setattr(storage_lease, "_SETTLES_S", 0.5)
    clients = type(files.filesystem("s3://bucket")[0])
    if request.param == "moto":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("moto"))
        clients.clear_instance_cache()
        fs, _ = files.filesystem("s3://bucket")
        if not fs.exists("bucket"):
            fs.mkdir("bucket")
    yield f"s3://bucket/{uuid.uuid4().hex}.lease"
    monkeypatch.undo()
    clients.clear_instance_cache()


def test_an_owner_that_is_heard_keeps_it_and_one_that_is_not_loses_it(url: str) -> None:
    first, second = Lease(url), Lease(url)
    assert first.take() is None
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(second.take)
        while not refused.done():
            assert first.beat() is None
        owner = refused.result()
    assert owner is not None
    assert str(owner).startswith(f"process {os.getpid()} on {os.uname().nodename}, since 20")
    second.release()  # of what it has not
    assert second.take() is None, "its owner was not heard of for all beats"
    assert str(first.beat()) == str(second._mine)  # pyright: ignore[reportPrivateUsage]
    first.release()
    assert files.exists(url), "it is the other's"


def test_what_is_given_back_is_taken_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lease, "BEAT_S", 60.0)
    for _ in range(2):
        lease = Lease(url)
        assert lease.take() is None
        lease.release()
        assert lease.beat() is None
        assert not files.exists(url), "a beat that comes late takes nothing"


def test_of_those_that_come_at_once_one_is_given_it(url: str) -> None:
    leases = [Lease(url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        owners = list(pool.map(Lease.take, leases))
    assert owners.count(None) == 1
    [taken] = [lease for lease, owner in zip(leases, owners, strict=True) if owner is None]
    assert taken.beat() is None


def test_storage_that_is_away_takes_no_lease(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lease, "BEAT_S", 0.2)
    lease = Lease(f"s3://bucket/{uuid.uuid4().hex}.lease")
    assert lease.take() is None
    s3_server.stop()
    try:
        assert lease.beat() is None
    finally:
        s3_server.start()
    assert lease.beat() is None
    lease.release()
