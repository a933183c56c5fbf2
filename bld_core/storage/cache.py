"""Remote files whose sha256 is known, kept on this machine: one of its processes fetches each, the others find it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from filelock import AcquireReturnProxy, UnixFileLock

from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.storage import files


def folder() -> Path:
    """Where fetched files lie: the variable BLD_CACHE, or else ~/.cache/bld."""
    return Path(os.environ.get("BLD_CACHE") or "~/.cache/bld").expanduser()


def verified(url: str, sha256: str) -> Path:
    """Where the file lies on this machine, its bytes compared with their sha256: once by a process, while it stays.

    A remote one is kept in the cache, which knows files by their sha256 alone.

    Raises:
        MissingError: there is no such file.
        DamagedError: its sha256 is another.
        UserError: the cache cannot be written.
    """
    if files.is_local(url):
        path = Path(files.filesystem(url)[1])
        if not path.is_file():
            raise MissingError(f"no file at {url!r}, which the manifest names: encode again", stages=("latents",))
        _check(_sha256(path), url, sha256)
        return path
    kept = folder() / sha256
    if not _is_whole(kept, sha256):
        with _lock(kept):
            if not _is_whole(kept, sha256):  # by now another process may have fetched it
                data = files.read_bytes(url)
                _check(files.sha256(data), url, sha256)
                files.write_bytes(str(kept), data)
    return kept


def _check(found: str, url: str, sha256: str) -> None:
    if found != sha256:
        raise DamagedError(
            url,
            f"has sha256 {found[:12]}, the manifest says {sha256[:12]}: it was damaged or replaced",
            ("latents",),
        )


_hashed: dict[Path, tuple[tuple[int, ...], str]] = {}


def _sha256(path: Path) -> str:
    """Of a file, which is read once, and again when it has changed."""
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _hashed.get(path, ((), ""))[0] != stamp:
        with open(path, "rb") as file:
            _hashed[path] = stamp, hashlib.file_digest(file, "sha256").hexdigest()
    return _hashed[path][1]


def _is_whole(kept: Path, sha256: str) -> bool:
    """Whether a file of the cache is there, and not damaged: else it must be fetched."""
    return kept.is_file() and _sha256(kept) == sha256


def _lock(kept: Path) -> AcquireReturnProxy[UnixFileLock]:
    """One process, or thread, at a time; the operating system lets go of the lock when the process ends."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return UnixFileLock(f"{kept}.lock", fallback_to_soft=False).acquire()
    except OSError as error:
        raise UserError(
            f"cannot keep remote files in {kept.parent} ({error}); set the variable BLD_CACHE, where Ray is started, "
            "to a local folder with room for the data set"
        ) from error
