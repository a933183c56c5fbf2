"""The rows of a sweep's table: what each trial has reached, how far it is from the best, and which are on the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bld_core.storage import files
from bld_core.trained import read_autoencoder, read_prior
from cluster.console import aligned
from cluster.sweep.space import GOALS, Goal, StageName, Trial, Values
from cluster.training.history import Evaluated, read_history

Outcome = Literal["finished", "stopped", "failed", "refused"]
_ORDER: dict[Outcome, int] = {"finished": 0, "stopped": 1, "failed": 2, "refused": 3}
_LESS = ("code_bits", "code_bits_entropy", "val_lpips")  # the less, the better, beside the PSNR


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a trial.

    Attributes:
        trial: its name.
        values: the fields that differ.
        outcome: "finished"; "stopped" early, as others were better; "failed"; or "refused", its settings do not go.
        evaluations: what it was seen to reach on held-out data, by step; the last counts.
        why: of what has failed or was refused.
        difference: of its last metric to that of the best, in the unit of the metric.
        difference_se: the standard error of that, from the differences of the held-out codes, which are the same.
        on_front: no other trial has a higher PSNR for fewer bits, stored and left to chance.
    """

    trial: str
    values: Values
    outcome: Outcome
    evaluations: Sequence[Evaluated] = ()
    why: str = ""
    difference: float = math.nan
    difference_se: float = math.nan
    on_front: bool = False

    @property
    def step(self) -> int:
        """Training steps before the last evaluation."""
        return self.evaluations[-1].step if self.evaluations else 0

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the last evaluation."""
        return self.evaluations[-1].metrics if self.evaluations else {}


def read_row(trial: Trial, stage: StageName, failures: Mapping[str, str]) -> Row:
    """What a trial's folder says of it.

    Args:
        trial: whose turn is over.
        stage: that it trains.
        failures: of the trials that have failed, why.
    """
    if trial.experiment is None:
        return Row(trial=trial.name, values=trial.values, outcome="refused", why=trial.why)
    history = read_history(files.join(trial.experiment.folder, stage))
    outcome: Outcome = "stopped" if history else "failed"
    if finished(trial, stage):
        outcome = "finished"
        read = read_prior if stage == "prior" else read_autoencoder
        if not history:  # trials of early versions have kept none
            steps = getattr(trial.experiment, GOALS[stage].training).steps
            history = [Evaluated(steps, dict(read(trial.experiment.folder).metrics))]
    elif trial.name in failures:
        outcome = "failed"
    if stage == "autoencoder":
        bits = math.prod(trial.experiment.code_shape)
        history = [_with_bits(each, bits) for each in history]
    why = failures.get(trial.name, "") if outcome == "failed" else ""
    return Row(trial=trial.name, values=trial.values, outcome=outcome, evaluations=history, why=why)


def _with_bits(evaluated: Evaluated, bits: int) -> Evaluated:
    entropy = evaluated.metrics.get("val_bit_entropy", 0.0)
    return replace(evaluated, metrics={**evaluated.metrics, "code_bits": bits, "code_bits_entropy": bits * entropy})


def finished(trial: Trial, stage: StageName) -> bool:
    """Whether a trial has been trained to its end."""
    folder = trial.experiment.folder if trial.experiment else ""
    return bool(folder) and files.exists(files.join(folder, stage, "final", "config.json"))


def ranked(rows: Sequence[Row], stage: StageName) -> list[Row]:
    """Rows with what they are to one another: finished ones first, the best above all."""
    goal = GOALS[stage]
    sign = 1 if goal.mode == "min" else -1
    ordered = sorted(rows, key=lambda row: (_ORDER[row.outcome], sign * _value(row, goal, sign * math.inf), row.trial))
    best = ordered[0] if ordered and ordered[0].evaluations else None
    front = _front(rows) if stage == "autoencoder" else set[str]()
    return [replace(_compared(row, best, goal), on_front=row.trial in front) for row in ordered]


def _value(row: Row, goal: Goal, missing: float) -> float:
    return row.metrics.get(goal.metric, missing)


def _compared(row: Row, best: Row | None, goal: Goal) -> Row:
    """A row with its difference to the best one, paired over the held-out codes where both have kept them."""
    if best is None or not row.evaluations:
        return row
    mine, others = row.evaluations[-1].per_code, best.evaluations[-1].per_code
    if not mine or len(mine) != len(others):
        return replace(row, difference=_value(row, goal, math.nan) - _value(best, goal, math.nan))
    differences = np.asarray(mine) - np.asarray(others)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return replace(row, difference=float(differences.mean()), difference_se=error)


def _front(rows: Sequence[Row]) -> set[str]:
    """The finished trials that no other beats in all of PSNR, bits, and LPIPS where there is one: the Pareto front."""

    def costs(row: Row) -> list[float]:
        return [-row.metrics["val_psnr"], *(row.metrics.get(name, 0.0) for name in _LESS)]

    known = {row.trial: np.asarray(costs(row)) for row in rows if row.outcome == "finished"}
    return {
        name
        for name, mine in known.items()
        if not any((other <= mine).all() and (other < mine).any() for other in known.values())
    }


def table_json(rows: Sequence[Row], stage: StageName) -> dict[str, Any]:
    """The table as JSON: "rows" of the trials that were measured, best first, and "others"."""
    measured = [_row_json(row, stage) for row in rows if row.evaluations and row.outcome != "failed"]
    others = [
        {"trial": row.trial, "values": row.values, "outcome": row.outcome, "step": row.step, "why": row.why}
        for row in rows
        if not row.evaluations or row.outcome == "failed"
    ]
    goal = GOALS[stage]
    return {"stage": stage, "metric": goal.metric, "mode": goal.mode, "rows": measured, "others": others}


def _row_json(row: Row, stage: StageName) -> dict[str, Any]:
    found: dict[str, Any] = {"trial": row.trial}
    if stage == "prior":  # as tables of early versions have it
        found |= {name.partition(".")[2]: value for name, value in row.values.items() if name.startswith("diffusion.")}
        found |= {"bound": row.metrics["val_bound"], "bound_se": row.metrics["val_bound_se"]}
    found |= {"values": row.values, "outcome": row.outcome, "step": row.step, "metrics": dict(row.metrics)}
    for name in ("difference", "difference_se"):
        if not math.isnan(value := getattr(row, name)):
            found[name] = value
    return found | ({"on_front": row.on_front} if stage == "autoencoder" else {})


def sweep_table(rows: Sequence[Row], stage: StageName = "prior") -> str:
    """The trials as lines of text, best first."""
    return "\n".join(aligned(table_cells(rows, stage)))


def table_cells(rows: Sequence[Row], stage: StageName) -> list[list[str]]:
    """The cells of the table, its head first."""
    fields = list(rows[0].values)
    columns = ["bound (bits a bit)", "to the best"] if stage == "prior" else _columns(rows)
    lines = [[*map(_title, fields), *columns, ""]]
    for row in rows:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in row.values.values()]
        lines.append([*values, *(_cells(row, stage, columns) if row.metrics else ["-"] * len(columns)), _said(row)])
    return lines


def _title(field: str) -> str:
    return "lambda" if field == "diffusion.vlb_weight" else field.rpartition(".")[2]


def _columns(rows: Sequence[Row]) -> list[str]:
    known = {name for row in rows for name in row.metrics}
    return [name for name in ("val_psnr", *_LESS) if name in known]


def _cells(row: Row, stage: StageName, columns: Sequence[str]) -> list[str]:
    if stage == "prior":
        error = f" +- {row.difference_se:.4f}" if not math.isnan(row.difference_se) else ""
        bound = f"{row.metrics['val_bound']:.4f} +- {row.metrics['val_bound_se']:.4f}"
        return [bound, f"{row.difference:+.4f}{error}" if row.difference else "best"]
    return [f"{row.metrics[name]:.4g}" if name in row.metrics else "-" for name in columns]


def _said(row: Row) -> str:
    """What is to be said of a row beside its values."""
    if row.outcome == "stopped":
        return f"stopped at step {row.step}"
    if row.outcome in ("failed", "refused"):
        return f"{row.outcome}: {row.why}"
    return "on the front" if row.on_front else ""
