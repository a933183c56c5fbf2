"""Tar shards in the WebDataset layout <-> samples: each sample of a shard is delivered, or left out with its reason.

A sample is `<key>.<extension>` with, optionally, its class: as text in `<key>.cls`, `.index` or `.txt`, or as a field
of `<key>.json` (see labels.py). Its files follow one another in the tar file, which may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from bld_core.data.labels import Labels
from bld_core.data.skipped import Left, Reason
from bld_core.data.tar import members, no_tar
from bld_core.errors import UserError
from bld_core.storage import files

_SHOWN = 80  # characters of what was found
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)  # as WebDataset splits a name
_NOTES = re.compile(r"__[^/]*__(/.*)?|(.*/)?__MACOSX/.*", re.DOTALL)  # what WebDataset keeps about a shard, and macOS
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 20


class Sample(NamedTuple):
    """One image of a shard: its key, its file as stored, its class (-1: none)."""

    key: str
    extension: str
    data: bytes | memoryview
    label: int


class Shard(NamedTuple):
    """What a shard holds.

    Attributes:
        samples: those that can be used so far as the tar file tells, in its order.
        left: everything else.
        others: extensions of samples that have no image.
    """

    samples: list[Sample]
    left: list[Left]
    others: set[str]


def read_shard(
    url: str,
    extensions: Iterable[str],
    limit: int | None = None,
    labels: Labels = Labels(),  # noqa: B008  # frozen
) -> Shard:
    """Read a shard: every sample of it is delivered or left out, once.

    A shard in which any sample has a class is one in which all need one.

    Args:
        url: of the tar file.
        extensions: which files are images; where a sample has several, the first of these is taken.
        limit: bytes to read; the rest then counts as cut off.
        labels: where classes stand.

    Raises:
        OSError: the file cannot be read to its end, which says nothing about the data.
    """
    with files.open_read(url) as file:  # which reads to the end of the file, or fails
        return parse_shard(file.read(-1 if limit is None else limit), extensions, labels)


def parse_shard(data: bytes, extensions: Iterable[str], labels: Labels = Labels()) -> Shard:  # noqa: B008  # frozen
    """The samples of a tar file in memory, which are views of `data` unless it is compressed."""
    left: list[Left] = []
    if data.startswith(_GZIP):
        data, left = _unzipped(data)
    if not data.strip(b"\0"):
        return Shard([], left or [Left(Reason.VACANT, f"{len(data)} bytes")], set())
    if other := no_tar(data):
        return Shard([], [Left(Reason.NO_TAR, other)], set())
    wanted = list(extensions)
    samples: list[Sample] = []
    others = set[str]()
    groups = list(_group(memoryview(data), left))
    # Where some are captions, one that is a number is one, too.
    captions = any("txt" in group.fields and labels.is_caption(group.fields["txt"]) for group in groups)
    for group in groups:
        outcome = _sample_or_left(group, wanted, labels, captions)
        if isinstance(outcome, Sample):
            samples.append(outcome)
        else:
            left.append(outcome)
            others |= group.fields.keys() if outcome.reason == Reason.NO_IMAGE else set()
    if any(sample.label >= 0 for sample in samples):
        left += [Left(Reason.NO_LABEL, sample.key) for sample in samples if sample.label < 0]
        samples = [sample for sample in samples if sample.label >= 0]
    if not samples and not left:
        left.append(Left(Reason.VACANT, "no sample at all"))
    return Shard(samples, left, others)


@dataclass
class _Group:
    """The files of one key that follow one another, the first of each extension; and why they cannot be used."""

    key: str
    fields: dict[str, memoryview] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)
    fault: Reason | None = None


def _group(tar: memoryview, left: list[Left]) -> Iterable[_Group]:
    """The first files of each key, in order; a key that comes again is left out, or its pieces are all at fault."""
    groups: dict[str, _Group] = {}
    again: list[_Group] = []
    current: _Group | None = None
    for member in members(tar):
        match = _KEY_AND_EXTENSION.fullmatch(member.name)
        if match is None or _NOTES.fullmatch(member.name):
            left += [Left(member.fault, member.name)] if member.fault else []
            continue
        key, extension = match[1], match[2].lower()
        if current is None or key != current.key:
            current = _Group(key)
            if key in groups:
                again.append(current)
            else:
                groups[key] = current
        current.fields.setdefault(extension, member.data)
        current.copies[extension] += 1
        current.fault = current.fault or member.fault
    for group in again:
        first = groups[group.key]
        if first.fields.keys() & group.fields.keys():
            left.append(Left(Reason.DUPLICATE, group.key))
        else:
            first.fault = Reason.APART
    for group in groups.values():
        left += [Left(Reason.DUPLICATE, group.key)] * (max(group.copies.values()) - 1)
    return groups.values()


def _unzipped(data: bytes) -> tuple[bytes, list[Left]]:
    """What gzip has packed, as far as it can be unpacked, and what is wrong behind that."""
    unpacked: list[bytes] = []
    faults: list[Left] = []
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        try:
            while piece := file.read1(_PIECE):
                unpacked.append(piece)
        except EOFError:  # cut off: the tar file in it ends early, too
            faults += [] if unpacked else [Left(Reason.TRUNCATED, "gzip")]
        except (OSError, zlib.error) as error:
            faults.append(Left(Reason.DAMAGED, f"gzip: {error}"))
    return b"".join(unpacked), faults


def _sample_or_left(group: _Group, wanted: list[str], labels: Labels, captions: bool) -> Sample | Left:
    """The sample of a group, or why there is none."""
    if group.fault is not None:
        return Left(group.fault, group.key)
    extension = next((e for e in wanted if e in group.fields), None)
    if extension is None:
        return Left(Reason.NO_IMAGE, group.key)
    texts = {name: data for name, data in group.fields.items() if not (captions and name == "txt")}
    try:
        return Sample(group.key, extension, group.fields[extension], labels.read(texts))
    except UserError:  # of the class list
        raise
    except (ValueError, RecursionError) as error:
        return Left(Reason.BAD_LABEL, group.key, f"{error}"[:_SHOWN])


def write_shard(url: str, samples: Iterable[Sample]) -> int:
    """Write a WebDataset shard with deterministic bytes, committed when complete; returns the number of samples."""
    from webdataset.writer import TarWriter

    count = 0
    with (
        files.commit(url) as file,
        TarWriter(file, encoder=False, mtime=0) as writer,  # pyright: ignore[reportArgumentType]  # any IO[bytes] will do
    ):
        for sample in samples:
            fields = {"__key__": sample.key, sample.extension: bytes(sample.data)}
            if sample.label >= 0:
                fields["cls"] = str(sample.label).encode()
            writer.write(fields)
            count += 1
    return count


def shard_size(samples: Iterable[tuple[int, int]]) -> int:
    """Bytes that `write_shard` writes for samples of (bytes of the image, class) with keys of up to 90 characters."""
    blocks = 0
    for size, label in samples:
        blocks += 1 + -(-size // tarfile.BLOCKSIZE) + (2 if label >= 0 else 0)  # a header and the data; the class
    size = (blocks + 2) * tarfile.BLOCKSIZE  # two blocks of zeros are the end
    return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
