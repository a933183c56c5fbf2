"""Damages to stored files, drawn by a seed: what disks, copies, editors and other processes do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """A damage.

    Attributes:
        file: what is damaged, relative to the experiment's folder.
        damage: its name in DAMAGES.
        seed: of what is left open.
    """

    file: str
    damage: str
    seed: int

    def apply(self, folder: Path) -> None:
        """Do it to an experiment's folder."""
        path = folder / self.file
        DAMAGES[self.damage](path, random.Random(self.seed))


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _zero(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    length = min(512, len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def _lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(1 + draw.randrange(64)))


def _empty(path: Path, draw: random.Random) -> None:
    del draw
    path.write_bytes(b"")


def _delete(path: Path, draw: random.Random) -> None:
    del draw
    path.unlink()


def _folder(path: Path, draw: random.Random) -> None:
    del draw
    path.unlink()
    path.mkdir()


def _another(path: Path, draw: random.Random) -> None:
    """Another file of the same kind in its place: of another step, stage or shard."""
    others = [other for other in path.parents[2].rglob(f"*{path.suffix}") if other != path and other.is_file()]
    path.write_bytes(draw.choice(sorted(others)).read_bytes())


def _edit(path: Path, draw: random.Random) -> None:
    """A number in a JSON file becomes another, or an entry of a list goes; of other files, a bit."""
    if path.suffix != ".json":
        _flip(path, draw)
        return
    record = json.loads(path.read_text())
    lists = [name for name, value in record.items() if isinstance(value, list) and len(value) > 1]
    numbers = [name for name, value in record.items() if isinstance(value, int)]
    if lists and draw.random() < 0.5:
        record[draw.choice(lists)].pop()
    elif numbers:
        record[draw.choice(numbers)] += 1
    else:
        record[draw.choice(sorted(record))] = "edited"
    path.write_text(json.dumps(record, indent=2) + "\n")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": _flip,
    "a page zeroed": _zero,
    "cut off": _cut,
    "lengthened": _lengthen,
    "emptied": _empty,
    "deleted": _delete,
    "a folder in its place": _folder,
    "another file in its place": _another,
    "edited": _edit,
}


def mutations(names: list[str], count: int, seed: int) -> list[Mutation]:
    """Damages of files, each file and each kind as often as the other, in an order by the seed."""
    draw = random.Random(seed)
    kinds = [damage for damage in DAMAGES for _ in range(-(-count // len(DAMAGES)))]
    targets = sorted(names) * -(-count // len(names))
    draw.shuffle(kinds)
    draw.shuffle(targets)
    return [
        Mutation(target, kind, draw.randrange(1 << 30))
        for target, kind in zip(targets[:count], kinds[:count], strict=True)
    ]
