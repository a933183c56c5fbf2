"""Files on any fsspec file system, a local path or a URL alike, each with a commit point.

A file appears under its name whole or not at all: written elsewhere first, then renamed (local), or uploaded as one
object (object stores). Object stores take endpoint and credentials from the standard AWS_* variables, and what fails
there for a passing reason is tried again, for BLD_STORAGE_SECONDS at the most.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any

import braceexpand
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from bld_core.errors import MissingError, UserError
from bld_core.storage.addresses import without_query
from bld_core.storage.patience import StorageError, persist, time_limit

_BLOCK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_CONNECT_S = 5.0
_SILENCE_S = 20.0
_CONNECTIONS = 32
_SLOWEST_UPLOAD = 1e6  # bytes a second
_WITHIN_FILES = ("zip", "tar", "libarchive")  # protocols of fsspec whose file lies behind the next ::
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FullError(UserError, OSError):
    """No space for a file, by the disk, a quota, or a limit on the size of files."""


def full(error: BaseException, path: str = "", wanted: int = 0) -> FullError | None:
    """What to tell the user of an error that says that there is no space; None of any other.

    Args:
        error: what the operating system has said.
        path: of the file, where the error does not name it.
        wanted: its size, as far as it is known.
    """
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    path = path or str(error.filename or "a file")
    size = f" of {wanted:,} bytes" if wanted else ""
    free = shutil.disk_usage(_nearest(path)).free
    return FullError(
        f"no space for {path!r}{size} ({error.strerror}; {free:,} bytes are free there): free some, or choose another "
        "folder, then run the same command again, which goes on where it stopped"
    )


def check_space(sizes: Mapping[str, int]) -> None:
    """Look, before files are written beside other work, whether a local disk has room for them.

    Args:
        sizes: bytes of each, by its path or URL, in the order in which they will be written; all on one file system.

    Raises:
        FullError: it has not; of the first that does not fit. Object stores are not asked, nor disks that do not tell.
    """
    room: int | None = None
    for url, size in sizes.items():
        fs, path = filesystem(url)
        if not isinstance(fs, LocalFileSystem):
            return
        if room is None:
            usage = shutil.disk_usage(_nearest(path))
            room = usage.free if usage.total else sum(sizes.values())
        room -= size
        if room < 0 and (error := full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path, size)) is not None:
            raise error


def _nearest(path: str) -> Path:
    """The innermost folder of a path that is there."""
    return next((folder for folder in Path(path).absolute().parents if folder.exists()), Path("/"))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a path or URL, and the path within it; one client, with its connections, a process.

    Raises:
        UserError: a protocol that is not known, or whose package is not installed.
    """
    remote = get_protocol(url) in ("s3", "s3a")
    try:
        fs, path = fsspec.core.url_to_fs(url, **(_s3_settings() if remote else {}))
    except ImportError as error:
        raise UserError(
            f"{url!r} needs a package that is not installed ({error}): install it, here and on every node"
        ) from error
    except ValueError as error:  # fsspec's word for a protocol that it does not know
        raise UserError(
            f"{url!r} is no address that can be read ({error}): give a path, or s3:// or https://"
        ) from error
    if remote:
        fs.retries = 1
    return fs, str(path)


def _silence() -> float:
    """Seconds after which a server that says nothing is taken for dead; an attempt may last no longer than all."""
    return min(_SILENCE_S, time_limit())


def _within(fs: fsspec.AbstractFileSystem, seconds: float) -> dict[str, float]:
    """The argument that ends an upload or deletion after so long, which its client knows no time limit for."""
    return {"timeout": seconds} if isinstance(fs, AsyncFileSystem) else {}


def _s3_settings() -> dict[str, Any]:
    return {
        # Other processes write, too: no cached listings, and a file that is replaced while it is read is an error,
        # noticed here because not every server knows If-Match.
        "use_listings_cache": False,
        "local_expiry_check": True,
        # One request at a time for each file: s3fs 2026.9 does not give back the connections of parallel parts when
        # one of them breaks, and then waits for a free one without end.
        "max_concurrency": 1,
        # One attempt: `persist` alone decides how often and how long.
        "config_kwargs": {
            "connect_timeout": min(_CONNECT_S, _silence()),
            "read_timeout": _silence(),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
        },
    }


def absolute(url: str) -> str:
    """A local path made absolute (~ is the home folder), any other URL as it is; so each source that `::` joins."""
    return "::".join(filesystem(source)[1] if is_local(source) else source for source in sources(url))


def is_local(url: str) -> bool:
    """Whether the path or URL lies on this machine's own file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """Append path parts to a path or URL."""
    return "/".join([url.rstrip("/"), *parts])


def name(url: str) -> str:
    """The last part of the path; nothing of a link's query, where signatures are."""
    return without_query(url).rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    """Whether a file or folder is there now (never from a cached listing)."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:  # not fs.exists, which takes some failures for an absence
        persist(f"look for {url!r}", fs.info, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listing(url: str) -> list[str]:
    """The names in a folder."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return sorted(name(str(entry)) for entry in persist(f"list {url!r}", fs.ls, path, detail=False))


def sources(pattern: str) -> list[str]:
    """The sources that `::` joins, as webdataset writes it.

    Raises:
        UserError: nothing stands between two of them.
    """
    joined: list[str] = []
    before = ""
    for part in pattern.split("::"):
        # Elsewhere `::` chains file systems, as in simplecache::s3://bucket/a.tar: such a chain is one source.
        if part in fsspec.available_protocols() or get_protocol(part) in _WITHIN_FILES:
            before += f"{part}::"
            continue
        joined.append(before + part)
        before = ""
    if before or (len(joined) > 1 and "" in joined):
        raise UserError(f"{pattern!r} has nothing before or behind a `::`, which joins two sources: complete it")
    return joined


def expand(pattern: str) -> list[str]:
    """The files of a pattern: sources joined by ::, braces {0000..0003}, then globs, as written; a glob's are sorted.

    Local paths come back absolute, so that they mean the same to workers with another working directory. A folder or
    file that is there under its very name is no glob, whatever brackets it has.

    Raises:
        MissingError: a named file, or every file of a glob, is missing.
        UserError: an unbalanced brace, or a folder.
    """
    found: list[str] = []
    for url in _braces(pattern):
        fs, path = filesystem(url)
        matches = [path]
        if any(c in path for c in ("*[" if get_protocol(url) in ("http", "https") else "*?[")):
            fs.invalidate_cache()
            wanted = _escaped(url, path)
            matches = [path] if wanted is None else sorted(map(str, persist(f"list {url!r}", fs.glob, wanted)))
        if not matches:
            raise MissingError(f"no file at {url!r} (from the pattern {pattern!r}); check the path and its braces")
        found += matches if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(match) for match in matches]
    try:
        sizes = _sizes(found)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = next((url for url in found if not exists(url)), found[0])
        raise MissingError(
            f"no file at {missing!r} (from the pattern {pattern!r}); check the path and its braces"
        ) from error
    for url, size in zip(found, sizes, strict=True):
        if (is_local(url) or size == 0) and _is_folder(url):
            raise UserError(
                f"{url!r} is a folder (from the pattern {pattern!r}); name the tar files in it, for example "
                f"{join(url, '*.tar')!r}; images that are in no tar file yet must be put into some"
            )
    return found


def _braces(pattern: str) -> list[str]:
    joined = sources(pattern)
    try:
        return [url for source in joined for url in braceexpand.braceexpand(source)]
    except ValueError as error:  # its only one
        raise UserError(
            f"the pattern {pattern!r} has a brace without its other half; write {{0000..0003}} for four numbers"
        ) from error


def _escaped(url: str, path: str) -> str | None:
    """A glob in which folders whose names have brackets stand for themselves; None where all of it is a name."""
    if "[" not in path:
        return path
    root = url[: len(url) - len(path)] if url.endswith(path) else ""
    parts = path.split("/")
    for known in range(len(parts), 0, -1):
        here = "/".join(parts[:known])
        if "[" in here and exists(root + here):
            rest = parts[known:]
            return "/".join([here.replace("[", "[[]"), *rest]) if rest else None
    return path


def _is_folder(url: str) -> bool:
    fs, path = filesystem(url)
    return persist(f"look for {url!r}", fs.isdir, path)


def _sizes(urls: list[str]) -> list[int]:
    """The sizes of files, asked for many at a time where the file system can.

    Raises:
        MissingError: one of them is missing.
    """
    sizes: list[int] = []
    for fs, some in itertools.groupby((filesystem(url) for url in urls), key=lambda place: place[0]):
        fs.invalidate_cache()
        paths = [path for _, path in some]
        here: Any = persist(f"look for {paths[0]!r} and the like", fs.sizes, paths)
        sizes += here
    return sizes


def fingerprint(urls: list[str]) -> str:
    """A hash of the names and sizes of files, which changes when one is added, removed or replaced by another size."""
    return sha256("\n".join(f"{name(url)} {size}" for url, size in zip(urls, _sizes(urls), strict=True)).encode())


class _Ranges(io.RawIOBase):
    """A remote file, read from front to back in byte ranges.

    A range that breaks off is asked for again from where it stopped: no byte is left out, none comes twice.
    """

    def __init__(self, url: str, file: Any) -> None:
        super().__init__()
        self._url = url
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        from s3fs.utils import FileExpired

        view = memoryview(buffer).cast("B")
        start = self._file.tell()
        count = min(len(view), self._file.size - start)

        def attempt() -> bytes:
            self._file.seek(start)
            try:
                data = self._file.read(count)
            except FileExpired as error:
                raise StorageError(f"{self._url!r} was replaced while it was read; run the command again") from error
            if len(data) != count:
                raise ConnectionError(f"{len(data)} bytes came instead of {count}")
            return data

        view[:count] = persist(f"read {self._url!r} from byte {start} on", attempt)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_read(url: str) -> IO[bytes]:
    """Open for reading in binary, front to back, a block at a time; a connection may break at any byte.

    Raises:
        MissingError: no such file.
        StorageError: a remote file that was replaced while it was read.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    file: Any = persist(f"open {url!r}", fs.open, path, "rb", block_size=_BLOCK_BYTES)
    if not getattr(file, "size", None):  # empty, or a server that knows no byte ranges
        return file
    return io.BufferedReader(_Ranges(url, file), _BUFFER_BYTES)


@contextlib.contextmanager
def commit(url: str, size: int = 0) -> Generator[IO[bytes]]:
    """Open for writing in binary; the file takes its name only if the block ends without an error.

    Args:
        url: the file.
        size: that it is going to have, where that is known.

    Raises:
        FullError: no space for it.
    """
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
        except OSError as error:
            size = size or (os.path.getsize(temporary) if os.path.exists(temporary) else 0)
            Path(temporary).unlink(missing_ok=True)
            if (problem := full(error, path, size)) is not None:
                raise problem from error
            raise
        finally:
            Path(temporary).unlink(missing_ok=True)
    else:
        with tempfile.NamedTemporaryFile() as file:
            try:
                yield file
                file.flush()
            except OSError as error:
                if (problem := full(error, file.name, size)) is not None:
                    raise problem from error
                raise
            seconds = _silence() + file.tell() / _SLOWEST_UPLOAD
            # One upload, which an object store shows only when it is complete.
            persist(f"write {url!r}", fs.put_file, file.name, path, **_within(fs, seconds))


def read_bytes(url: str) -> bytes:
    """The whole file."""
    with open_read(url) as file:
        return file.read()


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file, committed."""
    with commit(url, len(data)) as file:
        file.write(data)


def read_json(url: str) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(read_bytes(url))


def write_json(url: str, data: dict[str, Any]) -> None:
    """Write a JSON object, committed; the errors of `json_bytes`, before anything is written."""
    write_bytes(url, json_bytes(url, data))


def json_bytes(url: str, data: dict[str, Any]) -> bytes:
    """A JSON object as a file, indented, keys in the order given.

    Raises:
        ValueError: NaN or infinity in it, which other programs than Python's cannot read.
    """
    try:
        return f"{json.dumps(data, indent=2, allow_nan=False)}\n".encode()
    except ValueError as error:
        raise ValueError(
            f"{url!r} cannot hold what it is to hold ({error}): a number in it has become NaN or infinite; look at the "
            "step that made it"
        ) from error


def remove(url: str) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    fs, path = filesystem(url)

    def attempt() -> None:
        if exists(url):
            fs.rm(path, recursive=True, **_within(fs, time_limit()))

    persist(f"delete {url!r}", attempt)


def check_writable(url: str) -> None:
    """Write and delete a small file in the folder, so that a missing permission shows before the work.

    Raises:
        UserError: the folder cannot be written to.
    """
    probe = join(url, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise UserError(
            f"cannot write to {url!r} ({error}); choose another folder, or give this user write permission there"
        ) from error


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
