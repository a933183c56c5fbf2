"""Remote files whose sha256 is known, kept on this machine: one of its processes fetches each, the others find it."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import AcquireReturnProxy, UnixFileLock

from bld_core.errors import DamagedError, UserError
from bld_core.storage import files


def folder() -> Path:
    """Where fetched files lie: the variable BLD_CACHE, or else ~/.cache/bld."""
    return Path(os.environ.get("BLD_CACHE") or "~/.cache/bld").expanduser()


def read_verified(url: str, sha256: str) -> bytes:
    """The whole file; a remote one through the cache, which knows files by their sha256 alone.

    Raises:
        MissingError: there is no such file.
        DamagedError: its sha256 is another.
        UserError: the cache cannot be written.
    """
    if files.is_local(url):
        return _verify(files.read_bytes(url), url, sha256)
    kept = folder() / sha256
    data = _find(kept, sha256)
    if data is None:
        with _lock(kept):
            data = _find(kept, sha256)  # by now another process may have fetched it
            if data is None:
                data = _verify(files.read_bytes(url), url, sha256)
                files.write_bytes(str(kept), data)
    return data


def _verify(data: bytes, url: str, sha256: str) -> bytes:
    found = files.sha256(data)
    if found != sha256:
        raise DamagedError(
            url,
            f"has sha256 {found[:12]}, the manifest says {sha256[:12]}: it was damaged or replaced",
            ("latents",),
        )
    return data


def _find(kept: Path, sha256: str) -> bytes | None:
    """A file of the cache; None where it is missing or damaged, and must be fetched."""
    data = kept.read_bytes() if kept.is_file() else b""
    return data if files.sha256(data) == sha256 else None


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
