"""Seeded damage to the stored files of an experiment: every kind of damage that a disk or a person does."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_PAGE = 512


def _flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _zero(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = draw.randrange(max(1, len(data) - _PAGE))
    page = data[start : start + _PAGE]
    data[start : start + _PAGE] = bytes(len(page))
    file.write_bytes(data)


def _cut(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(1, len(data))])


def _lengthen(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(7))


def _empty(file: Path, draw: random.Random) -> None:
    del draw
    file.write_bytes(b"")


def _delete(file: Path, draw: random.Random) -> None:
    del draw
    file.unlink()


def _page_of_another(file: Path, draw: random.Random) -> None:
    """Something of another kind in its place: a proxy's page, say."""
    file.write_bytes(b"<!DOCTYPE html>\n" * draw.randrange(1, 99))


def _folder(file: Path, draw: random.Random) -> None:
    """What cannot be read as a file, by whatever user."""
    del draw
    file.unlink()
    file.mkdir()


def _number(file: Path, draw: random.Random) -> None:
    """A digit of a JSON file that is another one; still JSON."""
    text = file.read_text()
    places = [found.start() for found in re.finditer(r"(?<=[\s.\d])\d(?=[,\n])", text)]
    place = draw.choice(places)
    file.write_text(text[:place] + str((int(text[place]) + draw.randrange(1, 10)) % 10) + text[place + 1 :])


def _entry(file: Path, draw: random.Random) -> None:
    """A JSON file that has lost a field, or a list in it that has lost an entry."""
    found = json.loads(file.read_text())
    lists = [value for value in found.values() if isinstance(value, list) and len(value) > 1]
    if lists:
        lists[0].pop(draw.randrange(len(lists[0])))
    else:
        found.pop(draw.choice(sorted(found)))
    file.write_text(json.dumps(found, indent=2))


def _of_another(file: Path, draw: random.Random) -> None:
    """The file of the same name of another step, split or stage, or one of its kind."""
    root = file.parents[2]
    others = [other for other in sorted(root.rglob(f"*{file.suffix}")) if other.is_file() and other != file]
    named = [other for other in others if other.name == file.name] or others
    shutil.copy(draw.choice(named), file)


_ANY: list[Callable[[Path, random.Random], None]] = [
    *(_flip, _zero, _cut, _lengthen, _empty, _delete, _page_of_another, _folder, _of_another)
]
_JSON = [_number, _entry]


class Damage(NamedTuple):
    """One damage.

    Attributes:
        kind: of damage.
        file: relative to the experiment's folder.
        seed: of what it draws.
    """

    kind: str
    file: str
    seed: str

    def do(self, folder: Path) -> None:
        """Do it to an experiment's folder."""
        [damage] = [each for each in (*_ANY, *_JSON) if each.__name__ == f"_{self.kind}"]
        damage(folder / self.file, random.Random(self.seed))


def kind_of(file: str) -> str:
    """The kind of a stored file: its path without its numbers."""
    return re.sub(r"\d+", "#", file)


def damages(folder: Path, seed: int) -> Iterator[Damage]:
    """Damage without end: each kind of file in turn, each time with its next kind of damage, in a seeded order."""
    draw = random.Random(seed)
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".parquet"):
            kinds[kind_of(str(path.relative_to(folder)))].append(str(path.relative_to(folder)))
    ways = {kind: [*_ANY, *(_JSON if kind.endswith(".json") else [])] for kind in kinds}
    for way in ways.values():
        draw.shuffle(way)
    number = 0
    while True:
        order = sorted(kinds)
        draw.shuffle(order)
        for kind in order:
            way = ways[kind][number % len(ways[kind])]
            yield Damage(way.__name__.lstrip("_"), draw.choice(kinds[kind]), f"{seed} {number} {kind}")
        number += 1
