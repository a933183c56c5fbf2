"""Files on any fsspec file system, a local path or a URL alike, each with a commit point.

A file appears under its name whole or not at all: written elsewhere first, then renamed (local), or uploaded as one
object (object stores).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a path or URL, and the path within it."""
    fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def absolute(url: str) -> str:
    """A local path made absolute (~ is the home folder), any other URL as it is."""
    return filesystem(url)[1] if is_local(url) else url


def is_local(url: str) -> bool:
    """Whether the path or URL lies on this machine's own file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """Append path parts to a path or URL."""
    return "/".join([url.rstrip("/"), *parts])


def name(url: str) -> str:
    """The last part of a path or URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    """Whether a file or folder is there now (never from a cached listing)."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def listing(url: str) -> list[str]:
    """The names in a folder."""
    fs, path = filesystem(url)
    return sorted(name(str(entry)) for entry in fs.ls(path, detail=False))


def expand(pattern: str) -> list[str]:
    """The files of a pattern: braces {0000..0003}, then globs, in the order written; a glob's files are sorted.

    Local paths come back absolute, so that they mean the same to workers with another working directory.

    Raises:
        FileNotFoundError: a named file, or every file of a glob, is missing.
    """
    found: list[str] = []
    for url in braceexpand.braceexpand(pattern):
        fs, path = filesystem(url)
        fs.invalidate_cache()
        if any(c in path for c in "*?["):
            matches = sorted(str(match) for match in fs.glob(path))
        else:
            matches = [path] if fs.exists(path) else []
        if not matches:
            raise FileNotFoundError(f"no file at {url!r} (from the pattern {pattern!r}); check the path and its braces")
        found += matches if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(match) for match in matches]
    return found


def fingerprint(urls: list[str]) -> str:
    """A hash of the names and sizes of files, which changes when one is added, removed or replaced by another size."""
    sizes: list[str] = []
    for url in urls:
        fs, path = filesystem(url)
        sizes.append(f"{name(url)} {fs.size(path)}")
    return sha256("\n".join(sizes).encode())


@contextlib.contextmanager
def commit(url: str) -> Generator[IO[bytes]]:
    """Open for writing in binary; the file takes its name only if the block ends without an error."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    else:
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            fs.put_file(file.name, path)  # one upload, which an object store shows only when it is complete


def read_bytes(url: str) -> bytes:
    """The whole file."""
    fs, path = filesystem(url)
    data = fs.cat_file(path)
    assert isinstance(data, bytes), "a file is read as binary"
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file, committed."""
    with commit(url) as file:
        file.write(data)


def read_json(url: str) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(read_bytes(url))


def write_json(url: str, data: dict[str, Any]) -> None:
    """Write a JSON object, indented, keys in the order given, committed."""
    write_bytes(url, (json.dumps(data, indent=2) + "\n").encode())


def remove(url: str) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    fs, path = filesystem(url)
    if exists(url):
        fs.rm(path, recursive=True)


def check_writable(url: str) -> None:
    """Write and delete a small file in the folder, so that a missing permission shows before the work.

    Raises:
        ValueError: the folder cannot be written to.
    """
    probe = join(url, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise ValueError(
            f"cannot write to {url!r} ({error}); choose another --root, or give this user write permission there"
        ) from error


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
