"""The class of a sample: a number in any spelling, or a name of a list."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bld_core.errors import MissingError, UserError
from bld_core.storage import files
from bld_core.storage.patience import DeniedError

CLASSES = "classes.json"
"""Beside shards: the names of the classes by number, a JSON list."""

_LARGEST = 2**31 - 1
_TEXTS = ("cls", "index", "txt")  # files that hold nothing but the class
_FIELDS = ("label", "cls", "class")


@dataclass(frozen=True)
class Labels:
    """Where the class of a sample stands.

    Attributes:
        field: of `<key>.json`; empty looks for label, cls and class.
        names: URL of the class list; it is read when the first name is met.
        given: whether the list must be there; else it may be missing.
    """

    field: str = ""
    names: str = ""
    given: bool = False

    def read(self, fields: Mapping[str, bytes | memoryview]) -> int:
        """The class index of a sample, -1 for none; notes of other kinds are none.

        Args:
            fields: the files of the sample by extension, without txt where those of the shard are captions.

        Raises:
            ValueError: neither an index nor none; the message is what was found.
        """
        for extension in _TEXTS:
            if extension in fields:
                text = bytes(fields[extension])
                return self._index(_parsed(text))
        if "json" not in fields:
            return -1
        notes = json.loads(bytes(fields["json"]))
        if not isinstance(notes, dict):
            return -1
        for name in [self.field] if self.field else _FIELDS:
            if notes.get(name) is not None:
                try:
                    return self._index(notes[name])
                except ValueError:
                    if self.field or self.listed() or _is_number(notes[name]):
                        raise
        return -1

    def is_caption(self, text: bytes | memoryview) -> bool:
        """Whether a txt file holds something else than a class."""
        try:
            self._index(_parsed(bytes(text)))
        except ValueError:
            return True
        return False

    def _index(self, value: object) -> int:
        """A number in any spelling, or the number of a name."""
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            name, value = value, _parsed(value.encode())
            names = self.listed() if isinstance(value, str) else {}
            if name in names or (isinstance(value, str) and value in names):
                return names.get(name, names.get(str(value), -1))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{str(value)[:40]!r} is no class")
        index = int(value)
        if index != value or not -1 <= index <= _LARGEST:
            raise ValueError(f"{value} is no class in [0, {_LARGEST}]")
        return index

    def listed(self) -> dict[str, int]:
        """The numbers of the names in the class list; nothing where there is none."""
        return {name: number for number, name in enumerate(class_names(self.names, given=self.given))}


def _parsed(text: bytes) -> object:
    """What a text says: a JSON value, or else itself without the space around it."""
    said = text.decode(json.detect_encoding(text)).strip()  # UTF-8 or UTF-16, with a byte order mark or without
    if re.fullmatch(r"[+-]?\d{1,20}", said):
        return int(said)  # with leading zeros, which JSON does not know
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return said


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_there(url: str) -> bool:
    try:
        return files.exists(url)
    except DeniedError:  # beside signed links, and where only what is there may be asked for
        return False


@functools.cache
def class_names(url: str, *, given: bool = False) -> Sequence[str]:
    """The names of a class list by number; none where it is not there and need not be. Read once a process.

    Raises:
        MissingError: it is not there, but was given.
        UserError: it is no JSON list of different names.
    """
    if not url or (not given and not _is_there(url)):
        return ()
    try:
        names = json.loads(files.read_bytes(url))
    except FileNotFoundError as error:
        raise MissingError(f"`class_names` is {url!r}, which is not there: correct it, or leave it empty") from error
    except UserError:  # of storage
        raise
    except ValueError as error:
        raise UserError(f"the class list {url!r} is not JSON ({error}): it must be a list of names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UserError(f"the class list {url!r} is no JSON list of names that differ from one another: correct it")
    return tuple(names)
