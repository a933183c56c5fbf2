"""Reading tar files that may be damaged, cut off or hostile: POSIX ustar and pax, and GNU's long names and large sizes.

Python's own tarfile takes a damaged header for the end of the file, and so does WebDataset, which is built on it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

from bld_core.data.skipped import Reason

_BLOCK = 512
_LONGEST_NAME = 4096
_SIZE = re.compile(rb"\d{1,18}")
_MAGIC = b"ustar"  # in each header of all formats but the oldest
_TEXT = re.compile(rb"[^\0-\x08\x0e-\x1f]*[\s<{][^\0-\x08\x0e-\x1f]*")  # a header that is cut off is no words
_SHOWN = 40
_SHOWN_BYTES = 12

# Kinds of members, as in POSIX pax and GNU tar.
_PLAIN = b"0\x007"
_FOLDER = b"5"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_EXTENSIONS = b"xXgLK"  # what is said of the next member, or of all


_KINDS = {
    b"PK\x03\x04": "a zip archive: unpack it, and pack a tar file",
    b"PK\x05\x06": "an empty zip archive: unpack it, and pack a tar file",
    b"\x1f\x8b": "a file that gzip has packed twice: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it",
    b"\xfd7zXZ\0": "an xz file: unpack it",
    b"BZh": "a bzip2 file: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it, and pack a tar file",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself by git lfs pull",
    b"<!doctype html": "an HTML page: what a server answers instead of the file; download it again",
    b"<html": "an HTML page: what a server answers instead of the file; download it again",
    b"<?xml": "an XML text: what a server answers instead of the file; download it again",
    b"\x89PNG": "a PNG image: put images into a tar file",
    b"\xff\xd8\xff": "a JPEG image: put images into a tar file",
    b"PAR1": "a Parquet file: pack its images into a tar file",
    b"\x89HDF": "an HDF5 file: pack its images into a tar file",
}


def no_tar(data: bytes) -> str:
    """What a file is by its first bytes, and what to do, where it is no tar file; nothing of one, damaged or not."""
    start = data[:_BLOCK]
    if _header(start) is not None:
        return ""
    plain = start.removeprefix(codecs.BOM_UTF8).lstrip()
    for first, kind in _KINDS.items():
        if plain[: len(first)].lower() == first.lower():
            return kind
    if _TEXT.fullmatch(plain):
        said = plain[:_SHOWN].decode("utf-8", "replace")
        return f"a text, {said!r}: what a server answers instead of the file, or a list of files; give tar files"
    headers = (data[at : at + _BLOCK] for at in range(0, len(data), _BLOCK))
    if len(data) < _BLOCK or _MAGIC in data or any(map(_header, headers)):
        return ""
    return f"a file of another kind, which begins with {start[:_SHOWN_BYTES]!r}; give tar files"


class Member(NamedTuple):
    """A file of a tar file.

    Attributes:
        name: in the tar file, or where in it something is wrong.
        data: what it holds, a view of the tar file.
        fault: what is wrong with it.
    """

    name: str
    data: memoryview
    fault: Reason | None


def members(tar: memoryview) -> Iterator[Member]:
    """The files of a tar file, in order, except for folders; and what is wrong with it, under the number of its byte.

    Reading goes on behind what is damaged, with the next whole header.
    """
    at = 0
    ended = lost = cut = False  # behind zeros, which end a tar file; behind a damaged header; in the middle of a file
    extended: dict[bytes, bytes] = {}
    while at < len(tar):
        start, block = at, tar[at : at + _BLOCK].tobytes()
        at += _BLOCK
        if not block.strip(b"\0"):
            ended = True
            continue
        header = _header(block)
        if not lost and (ended or (header is None and len(block) == _BLOCK)):
            yield Member(f"byte {start}", tar[:0], Reason.DAMAGED)
        lost = header is None
        if header is None:
            continue
        kind, size = header.kind, header.size
        if kind not in _EXTENSIONS:
            size = int(extended.get(b"size", size))
        data = tar[at : at + (0 if kind in _WITHOUT_DATA else size)]
        at += -(-len(data) // _BLOCK) * _BLOCK
        ended, cut = False, len(data) < size and kind not in _WITHOUT_DATA
        if kind in _EXTENSIONS:
            cut = False
            try:
                extended |= _extension(kind, data.tobytes())
            except ValueError:
                yield Member(f"byte {start}", tar[:0], Reason.DAMAGED)
            continue
        name, fault = _name(extended.get(b"path", header.name))
        extended = {}
        if kind not in _PLAIN:
            fault = fault or Reason.NO_FILE
        if kind != _FOLDER and not (kind in _PLAIN and name.endswith("/")):
            yield Member(name, data, Reason.TRUNCATED if cut else fault)
    if not ended and not cut:
        yield Member(f"byte {len(tar)}", tar[:0], Reason.TRUNCATED)


class _Header(NamedTuple):
    """What a header block says of the file behind it."""

    name: bytes
    kind: bytes
    size: int


def _header(block: bytes) -> _Header | None:
    """Read a header block; None where it is none: damaged, or cut off."""
    checksum = block[148:156]
    try:
        if len(block) < _BLOCK or _number(checksum) != sum(block) - sum(checksum) + len(checksum) * ord(" "):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].rstrip(b"\0")
    prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
    return _Header(prefix + b"/" + name if prefix else name, block[156:157], size)


def _number(text: bytes) -> int:
    """A number of a header: octal digits, or binary where those are too few.

    Raises:
        ValueError: neither.
    """
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is no number")
    return int(digits, 8)


def _extension(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """What an extended header says of the next member: its path and size, where they do not fit into a plain header.

    Raises:
        ValueError: it cannot be read.
    """
    if kind == b"L":  # GNU
        return {b"path": data.rstrip(b"\0")}
    said: dict[bytes, bytes] = {}
    at = 0
    while kind in b"xX" and at < len(data):  # pax: "<length> <name>=<value>\n", the length being the whole record's
        digits = data[at : at + 20].partition(b" ")[0]
        end = at + int(digits)
        name, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or (name == b"size" and not _SIZE.fullmatch(value)):
            raise ValueError(f"record at byte {at} of an extended header")
        said |= {name: value} if name in (b"path", b"size") else {}
        at = end
    return said


def _name(raw: bytes) -> tuple[str, Reason | None]:
    """A member's name, and whether it is meant to do harm; no member is ever written under its name."""
    name = raw[:_LONGEST_NAME].decode("utf-8", "backslashreplace")
    parts = name.split("/")
    plain = raw.decode("utf-8", "ignore") == name and "\0" not in name
    return name, None if plain and not name.startswith("/") and ".." not in parts else Reason.HOSTILE
