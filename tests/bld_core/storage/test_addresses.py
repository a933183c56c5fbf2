"""Patterns and addresses as people write them; what servers refuse, in one message without secrets."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from bld_core.data.labels import class_names
from bld_core.errors import MissingError, UserError
from bld_core.storage import files
from bld_core.storage.addresses import without_query, without_secrets
from bld_core.storage.patience import DeniedError, StorageError

SIGNED = "X-Amz-Signature=5ecre7&X-Amz-Expires=60"


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path begins with, as often as it is told to, and then with the file."""

    refused: ClassVar[dict[str, int]] = {}

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, *, head: bool = False) -> None:
        status = int(self.path.split("/")[1])
        left = self.refused.get(self.path, -1)
        if left > 0:
            self.refused[self.path] = left - 1
        if left:
            self.send_error(status, "Slow Down" if status == 503 else None)
            return
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        if not head:
            self.wfile.write(b"abc")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called there
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, DeniedError, r"the server said 401 Unauthorized; give a signed link, or renew"),
        (403, DeniedError, r"the server said 403 Forbidden; give a signed link, or renew"),
        (404, MissingError, r"no file at 'http://.*/404/a.tar.*; check the path"),
        (400, StorageError, r"the server said 400 Bad Request; check the address"),
        (500, StorageError, r"tried [2-9] times in 1 s, at last: .*500.*Internal Server Error"),
        (503, StorageError, r"tried [2-9] times in 1 s, at last: .*503.*Slow Down"),
    ],
)
def test_a_web_server_that_refuses_is_one_message_without_the_signature(
    web: str, status: int, kind: type[UserError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "1")
    with pytest.raises(kind, match=said) as raised:
        files.expand(f"{web}/{status}/a.tar?{SIGNED}")
    assert "5ecre7" not in without_secrets(str(raised.value))
    if status != 404:  # which the command's last word makes public
        assert "5ecre7" not in str(raised.value)


def test_a_class_list_that_may_not_be_read_is_none_unless_it_was_given(web: str) -> None:
    assert class_names(f"{web}/403/classes.json") == class_names(f"{web}/404/classes.json") == ()
    with pytest.raises(DeniedError, match="403 Forbidden"):
        class_names(f"{web}/403/classes.json", given=True)


def test_a_web_server_that_refuses_for_a_while_is_asked_again(web: str) -> None:
    path = f"/503/{os.getpid()}.tar?{SIGNED}"
    Server.refused[path] = 4
    assert files.expand(web + path) == [web + path]
    assert files.read_bytes(web + path) == b"abc"


def test_a_closed_port_is_tried_again_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "1")
    with pytest.raises(StorageError, match=r"tried [2-9] times in 1 s, at last: .*Connect") as raised:
        files.expand(f"http://127.0.0.1:9/a.tar?{SIGNED}")
    assert "5ecre7" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, r"the server said 40[03] .*AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wr0ngkey"}, r"the server said 40[03] .*AWS_ACCESS_KEY_ID"),
    ],
)
def test_credentials_that_s3_refuses_are_one_message(
    s3: str, settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    files.filesystem("s3://bucket")[0].clear_instance_cache()
    try:
        with pytest.raises(DeniedError, match=said) as raised:
            files.expand(f"{s3}/a.tar")
        assert "wr0ngkey" not in str(raised.value)
    finally:
        files.filesystem("s3://bucket")[0].clear_instance_cache()


def test_a_joined_pattern_is_all_its_sources(tmp_path: Path) -> None:
    for name in ("a.tar", "b-0.tar", "b-1.tar", "c.tar"):
        (tmp_path / name).touch()
    joined = f"{tmp_path}/c.tar::{tmp_path}/b-{{0..1}}.tar::{tmp_path}/a*"
    assert [files.name(url) for url in files.expand(joined)] == ["c.tar", "b-0.tar", "b-1.tar", "a.tar"]
    assert files.absolute("a.tar::s3://b/c.tar") == f"{os.getcwd()}/a.tar::s3://b/c.tar"
    assert files.sources("simplecache::s3://b/a.tar::b.tar") == ["simplecache::s3://b/a.tar", "b.tar"]
    for wrong in ("a.tar::", "::a.tar", "a.tar::::b.tar"):
        with pytest.raises(UserError, match="nothing before or behind a `::`"):
            files.sources(wrong)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_folder_with_brackets_is_named_as_it_is(place: str, tmp_path: Path, s3: str) -> None:
    root = files.join(str(tmp_path) if place == "local" else f"{s3}/{tmp_path.name}", "br[1]")
    for name in ("a.tar", "b.tar", "c[2].tar"):
        files.write_bytes(files.join(root, name), b"x")
    assert [files.name(url) for url in files.expand(f"{root}/a.tar")] == ["a.tar"]
    assert [files.name(url) for url in files.expand(f"{root}/c[2].tar")] == ["c[2].tar"]
    assert [files.name(url) for url in files.expand(f"{root}/*.tar")] == ["a.tar", "b.tar", "c[2].tar"]
    assert [files.name(url) for url in files.expand(f"{root}/[ab].tar")] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{tmp}/a-{{0000..0003.tar", r"has a brace without its other half; write {0000\.\.0003}"),
        ("{tmp}", r"'{tmp}' is a folder .*for example '{tmp}/\*\.tar'"),
        (
            "gs://bucket/a.tar",
            r"'gs://bucket/a.tar' needs a package that is not installed \(.*gcsfs.*\): install it, here",
        ),
        (
            "nonsense://bucket/a.tar",
            r"is no address that can be read \(Protocol not known: nonsense\): give a path, or",
        ),
    ],
)
def test_what_names_no_files_is_one_message(pattern: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said.replace("{tmp}", str(tmp_path))):
        files.expand(pattern.format(tmp=tmp_path))


def test_a_link_is_the_same_file_when_its_signature_is_renewed() -> None:
    first, second = (f"https://host/data/a%20b.tar?X-Amz-Signature={n}/x&X-Amz-Date=2026" for n in (1, 2))
    assert files.name(first) == files.name(second) == "a%20b.tar"
    joined = f"{first}::https://host/c.tar#{SIGNED}"
    assert without_query(joined) == "https://host/data/a%20b.tar::https://host/c.tar"
    assert without_query("s3://bucket/a?.tar and /local/a?.tar") == "s3://bucket/a?.tar and /local/a?.tar"
    for odd in ("a,b.tar", "it's.tar", "a b.tar", "{a,b}.tar"):
        assert without_query(f"HTTPS://host/{odd}?{SIGNED},'x y'") == f"HTTPS://host/{odd}"
        assert "5ecre7" not in files.name(f"https://host/{odd}?{SIGNED}")
    assert without_query("https://h/{a.tar?s=1,2/b.tar?s=2}") == "https://h/{a.tar,2/b.tar}"
    assert without_secrets("'https://h/a.tar?t0ken' and https://h/?t0ken::b") == (
        "'https://h/a.tar?***' and https://h/?***::b"
    )
    assert "1/x" not in without_secrets(joined)
    assert without_secrets("a.tar?b=c::https://h/d.tar") == "a.tar?b=***::https://h/d.tar"
