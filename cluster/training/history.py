"""What the evaluations of a training have said, kept in its stage's folder: who compares trainings reads it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field

from bld_core.errors import DamagedError
from bld_core.storage import files
from bld_core.storage.records import read_record, set_aside, write_record

_HISTORY = "evaluations.json"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out data.

    Attributes:
        step: training steps before it.
        metrics: by name.
        per_code: what each held-out code pays of the bound, in bits a bit; empty where there is no bound.
        nodes: where the workers of the training ran, each node once; early versions did not write that down.
    """

    step: int
    metrics: dict[str, float]
    per_code: tuple[float, ...] = ()
    nodes: tuple[str, ...] = field(default=(), compare=False)


def read_history(folder: str) -> list[Evaluated]:
    """The evaluations that a stage's folder holds, in the order of their steps."""
    url = files.join(folder, _HISTORY)
    if not files.exists(url):
        return []
    try:
        found = read_record(url)["evaluations"]
    except DamagedError as error:
        sys.stderr.write(f"{error.url!r} {error.reason}; set aside as {set_aside(url)!r}\n")
        return []
    return [
        Evaluated(each["step"], each["metrics"], tuple(each["per_code"]), tuple(each.get("nodes", ())))
        for each in found
    ]


def keep_evaluation(folder: str, evaluated: Evaluated) -> None:
    """Add an evaluation; one of the same step, or of steps that are taken again, gives way."""
    before = [each for each in read_history(folder) if each.step < evaluated.step]
    write_record(files.join(folder, _HISTORY), {"evaluations": [asdict(each) for each in [*before, evaluated]]})
