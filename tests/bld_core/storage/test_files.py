from __future__ import annotations

import copy
import os
import resource
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from bld_core.storage import files
from bld_core.storage.patience import StorageError, persist
from tests.servers import S3Server, Wire


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """An empty folder: on the disk, in fsspec's memory file system, on an S3 server."""
    places = {"local": str(tmp_path), "memory": f"memory://{uuid.uuid4().hex}", "s3": f"{s3}/{uuid.uuid4().hex}"}
    return places[request.param]


class InterruptionError(Exception):
    pass


def test_bytes_and_json_survive_the_way_there_and_back(root: str) -> None:
    url = files.join(root, "deep", "er", "file.bin")
    files.write_bytes(url, b"\0one")
    files.write_bytes(url, b"two")  # replaces
    assert files.read_bytes(url) == b"two"
    data = {"b": 1, "a": [1.5, "x", None]}
    files.write_json(files.join(root, "x.json"), data)
    assert list(files.read_json(files.join(root, "x.json")).items()) == list(data.items())
    assert files.listing(root) == ["deep", "x.json"]


def fail_half_way(url: str) -> None:
    with files.commit(url) as file:
        file.write(b"half")
        raise InterruptionError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_no_number_that_json_does_not_know(tmp_path: Path, value: float) -> None:
    url = str(tmp_path / "x.json")
    with pytest.raises(ValueError, match=rf"'{url}' cannot hold .*{value}.* NaN or infinite"):
        files.write_json(url, {"figures": {"psnr": value}})
    assert not list(tmp_path.iterdir())


def test_a_committed_file_is_whole(root: str) -> None:
    url = files.join(root, "file.bin")
    with files.commit(url) as file:
        file.write(b"half")
        file.write(b" and half")
    assert files.read_bytes(url) == b"half and half"
    assert files.listing(root) == ["file.bin"]


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    url = str(tmp_path / "file.bin")
    with files.commit(url) as file:
        file.write(b"half")
        assert not files.exists(url)
    assert files.exists(url)


def test_a_block_that_raises_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    url = str(tmp_path / "file.bin")
    with pytest.raises(InterruptionError):
        fail_half_way(url)
    assert list(tmp_path.iterdir()) == []  # nor a temporary file
    files.write_bytes(url, b"before")
    with pytest.raises(InterruptionError):
        fail_half_way(url)
    assert files.read_bytes(url) == b"before"
    assert files.listing(str(tmp_path)) == ["file.bin"]


def test_a_block_that_raises_leaves_nothing_under_the_name_in_memory() -> None:
    url = f"memory://{uuid.uuid4().hex}/file.bin"
    with pytest.raises(InterruptionError):
        fail_half_way(url)
    assert not files.exists(url)


def test_patterns_expand_braces_in_the_order_written_and_sort_globs(root: str) -> None:
    for i in range(12):
        files.write_bytes(files.join(root, f"s-{i:04d}.tar"), str(i).encode())

    def contents(pattern: str) -> list[int]:
        return [int(files.read_bytes(url)) for url in files.expand(files.join(root, pattern))]

    assert contents("s-0003.tar") == [3]
    assert contents("s-{0009..0011}.tar") == [9, 10, 11]
    assert contents("s-{0007,0002}.tar") == [7, 2]
    assert contents("s-*.tar") == list(range(12))
    assert contents("s-000[24].tar") == [2, 4]
    assert contents("s-{001*,0000}.tar") == [10, 11, 0]


def test_a_missing_file_of_a_pattern_is_named_with_the_pattern(root: str) -> None:
    files.write_bytes(files.join(root, "s-0.tar"), b"")
    for pattern, missing in [("s-{0..1}.tar", r"s-1\.tar"), ("t-*.tar", r"t-\*\.tar"), ("none.tar", r"none\.tar")]:
        with pytest.raises(FileNotFoundError, match=rf"{missing}.*pattern"):
            files.expand(files.join(root, pattern))


def test_local_paths_come_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert files.expand("a.tar") == files.expand("*.tar") == [str(tmp_path / "a.tar")]
    assert files.absolute("x/y") == str(tmp_path / "x/y")
    assert files.absolute("~/x") == str(Path.home() / "x")
    assert files.absolute("memory://x") == "memory://x"


def test_remove_takes_files_and_folders_and_forgives_their_absence(root: str) -> None:
    url = files.join(root, "folder", "file")
    files.write_bytes(url, b"")
    files.remove(files.join(root, "nothing"))
    files.remove(files.join(root, "folder"))
    assert not files.exists(url)


def test_a_writable_folder_is_left_as_it_was(root: str) -> None:
    files.write_bytes(files.join(root, "file"), b"")
    files.check_writable(root)
    assert files.listing(root) == ["file"]


@pytest.mark.parametrize("impossible", ["/proc/nowhere", "/dev/null/folder"])
def test_a_folder_that_cannot_be_written_to_is_named(impossible: str) -> None:
    with pytest.raises(ValueError, match=f"cannot write to '{impossible}'"):
        files.check_writable(impossible)


def test_names_and_kinds() -> None:
    assert files.name("s3://bucket/a/b.tar") == files.name("/x/b.tar") == "b.tar"
    assert files.name("folder/") == "folder"
    assert files.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert files.is_local("relative/path")
    assert not files.is_local("memory://x")


def test_sha256_is_the_published_one() -> None:
    assert files.sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- A server that fails ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    """Clients of a test's own, which read the variables that it has set."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def wire(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The way to the S3 server, which can be broken; clients of this test take it."""
    wire = Wire(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    yield wire
    wire.close()


def big_file(s3: str, name: str) -> tuple[str, bytes]:
    content = os.urandom(10 << 20)
    url = files.join(s3, "files", name)
    files.write_bytes(url, content)
    return url, content


def test_a_read_that_breaks_off_goes_on_with_the_next_byte(s3: str, wire: Wire) -> None:
    url, content = big_file(s3, "big")
    wire.breaks_after = [3 << 20, 100, 5 << 20, 1 << 20]
    with files.open_read(url) as file:
        parts = list(iter(lambda: file.read(77_777), b""))
    assert not wire.breaks_after, "the connection did not break as often as it should"
    assert b"".join(parts) == content
    wire.breaks_after = [5 << 20, 8 << 20]
    assert files.read_bytes(url) == content
    assert not wire.breaks_after


def test_connections_are_used_again(s3: str, wire: Wire) -> None:
    urls = [files.join(s3, "reuse", str(i)) for i in range(5)]
    for url in urls:
        files.write_bytes(url, url.encode())
    assert [files.read_bytes(url) for url in urls] == [url.encode() for url in urls]
    assert wire.connections <= 2


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(s3: str) -> None:
    url, content = big_file(s3, "replaced")
    with files.open_read(url) as file:
        assert file.read(10) == content[:10]
        files.write_bytes(url, content[::-1])
        with pytest.raises(OSError, match="replaced while it was read"):
            file.read()


@pytest.mark.long
def test_an_outage_is_waited_for_by_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    server = S3Server(tmp_path)
    for name, value in server.settings.items():
        monkeypatch.setenv(name, value)
    server.start()
    url = "s3://bucket/folder/file"
    files.write_bytes(url, b"before")
    operations = [
        lambda: files.exists(url),
        lambda: files.listing("s3://bucket/folder") == ["file"],
        lambda: files.expand("s3://bucket/folder/*") == files.expand("s3://bucket/folder/{file,file}")[:1] == [url],
        lambda: files.read_bytes(url) == b"before",
        lambda: len(files.fingerprint([url])) == 64,
        lambda: files.write_bytes("s3://bucket/other", b"x") is None,
        lambda: files.remove("s3://bucket/other") is None,
    ]
    try:
        for operation in operations:
            server.stop()
            threading.Timer(0.3, server.start).start()
            assert operation()
    finally:
        server.stop()


@pytest.mark.long
@pytest.mark.parametrize("listens", [False, True], ids=["away", "silent"])
def test_a_server_that_stays_away_or_silent_is_an_error_within_the_limit(
    listens: bool, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "2")
    if not listens:
        listener.close()
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=r"cannot look for 's3://bucket/x': tried \d+ times in \d s.*check the server"
    ):
        files.exists("s3://bucket/x")
    with pytest.raises(ValueError, match="cannot write to 's3://bucket'"):
        files.check_writable("s3://bucket")
    assert time.monotonic() - began < 30
    listener.close()


def test_what_does_not_pass_is_raised_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        files.read_bytes(f"{s3}/nothing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError):
        files.exists(f"{s3}/file")
    assert time.monotonic() - began < 30
    with pytest.raises(InterruptionError):
        persist("fail", fail_half_way, "memory://interrupted")
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "soon")
    with pytest.raises(ValueError, match="BLD_STORAGE_SECONDS is 'soon'"):
        persist("anything", int)


def test_no_space_names_the_file_its_size_and_the_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    url, before = str(tmp_path / "folder/file"), resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_on() -> None:
        with files.commit(url) as file:
            for _ in range(10):
                file.write(bytes(50_000))

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            files.FullError, match=rf"no space for '{url}' of 123,456 bytes \(File too .*: free some, or"
        ):
            files.write_bytes(url, bytes(123_456))
        with pytest.raises(files.FullError, match=r"of 100,000 bytes"):  # what was written is known
            write_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "folder").iterdir()) == []
    error = copy.copy(files.FullError("no space"))  # as it comes from another process
    assert (type(error), str(error)) == (files.FullError, "no space")
