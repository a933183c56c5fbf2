"""What is stored, known by its sha256: JSON records that carry their own, and the files that they vouch for.

A record is written last, after all files that it names. Records and files of early versions, without a digest or a
size, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from bld_core.errors import DamagedError, UserError
from bld_core.storage import files
from bld_core.storage.patience import persist

_DIGEST = "record_sha256"
_ASIDE = ".damaged"
_BLOCK_BYTES = 8 << 20


class Part(NamedTuple):
    """A file as a record knows it: its sha256, and its size where that was written down."""

    sha256: str
    bytes: int | None = None


class Fault(NamedTuple):
    """What is wrong with a file: the end of a sentence that begins with its name."""

    url: str
    reason: str


def write_record(url: str, data: Mapping[str, Any]) -> None:
    """Write a JSON object, committed, and in it the sha256 of all its other fields; the errors of `write_json`."""
    files.write_json(url, {**data, _DIGEST: _digest(url, data)})


def read_record(url: str, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `write_record` wrote.

    Args:
        url: of the file.
        stages: what makes it, for the remedy.

    Raises:
        DamagedError: it is missing, cannot be read, or is not what was written.
    """
    return parse_record(url, read_file(url, stages), stages)


def parse_record(url: str, data: bytes, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record from its bytes; as `read_record`."""
    try:
        found = json.loads(data)
    except ValueError as error:  # of JSON, or of UTF-8
        raise DamagedError(url, f"is not JSON ({error}): it was cut off or damaged", stages) from error
    if not isinstance(found, dict):
        raise DamagedError(url, f"holds {type(found).__name__} where an object was written: it was replaced", stages)
    said = found.pop(_DIGEST, None)
    if said is not None and said != (digest := _digest(url, found)):
        raise DamagedError(
            url,
            f"says of itself that it has sha256 {str(said)[:12]}, but has {digest[:12]}: it was changed or damaged",
            stages,
        )
    return found


def _digest(url: str, data: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, however it is laid out, and of its file's name, which says what kind it is.

    Tuples are lists, as they will be read back.
    """
    fields = {name: value for name, value in data.items() if name != _DIGEST}
    return files.sha256(json.dumps([files.name(url), json.loads(json.dumps(fields))], sort_keys=True).encode())


def part_of(data: bytes) -> dict[str, int | str]:
    """What a record says of a file with these bytes: JSON values, the fields of a Part."""
    return Part(files.sha256(data), len(data))._asdict()


def part_of_file(url: str) -> dict[str, int | str]:
    """The same of a file that is there, read a block at a time."""
    digest, size = hashlib.sha256(), 0
    with files.open_read(url) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return Part(digest.hexdigest(), size)._asdict()


def read_file(url: str, stages: tuple[str, ...] = ()) -> bytes:
    """The whole file.

    Raises:
        DamagedError: it is missing or cannot be read.
        StorageError: remote storage is away.
    """
    try:
        return files.read_bytes(url)
    except FileNotFoundError as error:
        raise DamagedError(url, "is missing", stages) from error
    except UserError:
        raise
    except OSError as error:
        raise DamagedError(url, f"cannot be read ({error.strerror or error})", stages) from error


def read_part(url: str, part: Part, record: str, stages: tuple[str, ...] = ()) -> bytes:
    """The whole file, read once and compared with what the record says of it.

    Raises:
        DamagedError: it is missing, cannot be read, or is another file.
    """
    data = read_file(url, stages)
    if reason := _differs(part, record, len(data), files.sha256(data)):
        raise DamagedError(url, reason, stages)
    return data


def _differs(part: Part, record: str, size: int | None, sha256: str | None) -> str:
    if None not in (size, part.bytes) and size != part.bytes:
        return f"has {size} bytes, {record} says {part.bytes}: it was cut off or replaced"
    if sha256 is not None and sha256 != part.sha256:
        return f"has sha256 {sha256[:12]}, {record} says {part.sha256[:12]}: it was damaged or replaced"
    return ""


def part_faults(
    folder: str, there: Mapping[str, int | None], parts: Mapping[str, Part], record: str, *, deep: bool
) -> list[Fault]:
    """What is wrong with the files of a folder, by their `sizes`, or with `deep` by reading all of them."""
    found: list[Fault] = []
    for name, part in parts.items():
        url = files.join(folder, name)
        if name not in there:
            found.append(Fault(url, "is missing"))
        elif reason := _differs(part, record, there[name], None):
            found.append(Fault(url, reason))
        elif deep:
            try:
                read_part(url, part, record)
            except DamagedError as error:
                found.append(Fault(url, error.reason))
    return found


def named_faults(folder: str, record: Mapping[str, Any], name: str) -> list[Fault]:
    """What is wrong with the files that a record names in `files`, all of which are read; those of `part_of`.

    Args:
        folder: of the files.
        record: that of an early version names none.
        name: of the record.
    """
    parts = {file: Part(**part) for file, part in record.get("files", {}).items()}
    return part_faults(folder, sizes(folder), parts, name, deep=True) if parts else []


def sizes(folder: str) -> dict[str, int | None]:
    """The size of each file in a folder, by name, None where the server does not say; empty without a folder."""
    fs, path = files.filesystem(folder)
    fs.invalidate_cache()
    try:
        entries = persist(f"list {folder!r}", fs.ls, path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {files.name(str(entry["name"])): entry.get("size") for entry in entries if entry["type"] == "file"}


def set_aside(url: str) -> str:
    """Rename what is damaged, a file or a folder, to the first free `<url>.damaged`; returns that."""
    aside, number = f"{url.rstrip('/')}{_ASIDE}", 1
    while files.exists(aside):
        number += 1
        aside = f"{url.rstrip('/')}{_ASIDE}-{number}"
    fs, path = files.filesystem(url)
    persist(f"rename {url!r}", fs.mv, path, files.filesystem(aside)[1], recursive=True)
    return aside
