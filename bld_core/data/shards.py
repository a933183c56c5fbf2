"""Tar shards in the WebDataset layout <-> samples: each sample of a shard is delivered, or left out with its reason.

A sample is `<key>.<extension>` with, optionally, its class index: as text in `<key>.cls`, or as the field `label` or
`cls` of `<key>.json`. Its files follow one another in the tar file.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bld_core.data.skipped import Left, Reason
from bld_core.data.tar import members
from bld_core.storage import files

_BUFFER_BYTES = 1 << 20
_LARGEST_LABEL = 2**31 - 1
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)  # as WebDataset splits a name
_NOTES = re.compile(r"__[^/]*__(/.*)?", re.DOTALL)  # what WebDataset keeps about a shard


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


def read_shard(url: str, extensions: Iterable[str], limit: int | None = None) -> Shard:
    """Read a shard: every sample of it is delivered or left out, once.

    A shard in which any sample has a class is one in which all need one.

    Args:
        url: of the tar file.
        extensions: which files are images; where a sample has several, the first of these is taken.
        limit: bytes to read; the rest then counts as cut off.

    Raises:
        OSError: the file cannot be read to its end, which says nothing about the data.
    """
    with files.open_read(url) as file:  # which reads to the end of the file, or fails
        return parse_shard(file.read(-1 if limit is None else limit), extensions)


def parse_shard(data: bytes, extensions: Iterable[str]) -> Shard:
    """The samples of a tar file in memory; they are views of `data`."""
    wanted = list(extensions)
    left: list[Left] = []
    samples: list[Sample] = []
    others = set[str]()
    for group in _group(memoryview(data), left):
        outcome = _sample_or_reason(group, wanted)
        if isinstance(outcome, Sample):
            samples.append(outcome)
        else:
            left.append(Left(outcome, group.key))
            others |= group.fields.keys() if outcome == Reason.NO_IMAGE else set()
    if any(sample.label >= 0 for sample in samples):
        left += [Left(Reason.NO_LABEL, sample.key) for sample in samples if sample.label < 0]
        samples = [sample for sample in samples if sample.label >= 0]
    if not samples and not left:
        left.append(Left(Reason.NO_IMAGE, "no sample at all"))
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


def _sample_or_reason(group: _Group, wanted: list[str]) -> Sample | Reason:
    """The sample of a group, or why there is none."""
    if group.fault is not None:
        return group.fault
    extension = next((e for e in wanted if e in group.fields), None)
    if extension is None:
        return Reason.NO_IMAGE
    try:
        return Sample(group.key, extension, group.fields[extension], _label(group.fields))
    except (ValueError, RecursionError):
        return Reason.BAD_LABEL


def _label(fields: Mapping[str, memoryview]) -> int:
    """The class index, -1 for none. JSON often holds other things, so that a field which is no number is no class.

    Raises:
        ValueError: neither an index nor none.
    """
    label = -1
    if "cls" in fields:
        label = int(bytes(fields["cls"]))
    elif "json" in fields:
        notes = json.loads(bytes(fields["json"]))
        named = [notes.get(name) for name in ("label", "cls")] if isinstance(notes, dict) else []
        label = next((value for value in named if type(value) is int), -1)
    if not -1 <= label <= _LARGEST_LABEL:
        raise ValueError(f"class {label} is not in [0, {_LARGEST_LABEL}]")
    return label


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
