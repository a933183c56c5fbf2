from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from bld_core import files


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on the disk and in fsspec's memory file system."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


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
