"""The report of a sweep: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.ensemble import RandomForestRegressor

from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.lineage import git_commit
from cluster.plots import Axis, Line, Panel, panels_figure, parallel_figure, shares_figure, svg
from cluster.report.page import rendered
from cluster.sweep.space import GOALS, StageName, nested, settings_of, span_of
from cluster.sweep.table import Row, table_cells

_TEMPLATE = Path(__file__).with_name("sweep.html")
_WIDE, _HALF = (10.6, 3.8), (5.2, 3.2)  # inches
_FEWEST = 6  # trials that say something of the importance of fields
_TREES = 200


def write_sweep_report(experiment: Experiment, stage: StageName, rows: Sequence[Row], command: str) -> str:
    """The rows of a sweep -> report.html in its folder; returns the path of the page.

    Args:
        experiment: of the sweep.
        stage: of the sweep.
        rows: ranked.
        command: that trains the best to its full length.
    """
    goal = GOALS[stage]
    measured = [row for row in rows if row.evaluations]
    shares = importance(measured, stage)
    spans = [span_of(experiment, row.values) for row in rows if row.outcome != "refused"]
    page = {
        "name": experiment.name,
        "stage": stage,
        "metric": f"{goal.metric.removeprefix('val_')}, {goal.unit}",
        "counts": {
            outcome: sum(row.outcome == outcome for row in rows)
            for outcome in ("finished", "stopped", "failed", "refused")
        },
        "steps": sum(row.step - span_of(experiment, row.values)[0] for row in rows if row.evaluations),
        "all_steps": sum(last - first for first, last in spans),
        "best": rows[0],
        "best_value": f"{rows[0].metrics[goal.metric]:.4f}",
        "settings": yaml.safe_dump(nested(rows[0].values)),
        "command": command,
        "goes_on": "--start_from" in command,
        "head_and_lines": table_cells(rows, stage),
        "curves": svg(panels_figure([_curves(measured, stage)], _HALF)),
        "parallel": svg(parallel_figure(_axes(measured, stage), _shades(measured, stage), _WIDE)),
        "importance": svg(shares_figure(shares, _HALF)) if shares else "",
        "front": svg(panels_figure(_front(measured), (4.6, 3.2))) if stage == "autoencoder" else "",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}",
        "commit": git_commit(),
    }
    url = files.join(experiment.folder, goal.folder, "report.html")
    files.write_bytes(url, rendered(_TEMPLATE, page))
    return url


def _curves(rows: Sequence[Row], stage: StageName) -> Panel:
    metric = GOALS[stage].metric
    lines = [
        Line([each.step for each in row.evaluations], [each.metrics[metric] for each in row.evaluations], faint=True)
        for row in rows[1:]
    ]
    best = rows[0]
    shown = [each.metrics[metric] for each in best.evaluations]
    lines.append(Line([each.step for each in best.evaluations], shown, name="the best"))
    return Panel("Every trial, held-out", "step", GOALS[stage].unit, lines)


def _texts(rows: Sequence[Row], field: str) -> list[str]:
    return [value if isinstance(value, str) else json.dumps(value) for value in (row.values[field] for row in rows)]


def _axes(rows: Sequence[Row], stage: StageName) -> list[Axis]:
    fields = settings_of(rows[0].values)
    axes = [_axis(field.rpartition(".")[2], [row.values[field] for row in rows]) for field in fields]
    metric = GOALS[stage].metric
    return [*axes, _axis(metric.removeprefix("val_"), [row.metrics[metric] for row in rows])]


def _axis(name: str, values: Sequence[Any]) -> Axis:
    """An axis: numbers where they lie, by their logarithm where they span a factor above 8, others in order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len({*values}) <= 4:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        order = [json.dumps(v) for v in sorted({*values})] if numbers else sorted({*texts})
        place = {text: (i + 0.5) / len(order) for i, text in enumerate(order)}
        return Axis(name, [place[text] for text in texts], [(y, text) for text, y in place.items()])
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 8

    def scale(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)

    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    return Axis(name, [scale(value) for value in values], [(scale(v), f"{v:.3g}") for v in (low, middle, high)])


def _shades(rows: Sequence[Row], stage: StageName) -> list[float]:
    """Of lines: 0 is the best trial, 1 the worst, in order."""
    goal = GOALS[stage]
    values = [row.metrics[goal.metric] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: values[i], reverse=goal.mode == "max")
    return [order.index(i) / max(1, len(rows) - 1) for i in range(len(rows))]


def importance(rows: Sequence[Row], stage: StageName) -> dict[str, float]:
    """How much each field counts for the metric: its share of what a random forest's splits explain (Breiman 2001).

    Stopped trials count by their last evaluation. Too few trials, or values that never differ, give nothing.
    """
    y = np.asarray([row.metrics[GOALS[stage].metric] for row in rows])
    if len(rows) < _FEWEST or not np.ptp(y) > 0:
        return {}
    columns = {field: _column(rows, field) for field in settings_of(rows[0].values)}
    forest = RandomForestRegressor(_TREES, random_state=0)
    forest.fit(np.stack([*columns.values()], 1), y)
    return dict(zip(columns, forest.feature_importances_.tolist(), strict=True))


def _column(rows: Sequence[Row], field: str) -> list[float]:
    values = [row.values[field] for row in rows]
    if all(isinstance(value, int | float) for value in values):
        return [float(value) for value in values]
    texts = _texts(rows, field)
    order = sorted({*texts})
    return [float(order.index(text)) for text in texts]


def _front(rows: Sequence[Row]) -> list[Panel]:
    """PSNR against the bits that are stored, and against those that the encoder leaves to chance."""

    def panel(name: str, title: str) -> Panel:
        lines: list[Line] = []
        for on_front, label in ((False, ""), (True, "on the front")):
            some = [row for row in rows if row.on_front == on_front]
            x, y = ([row.metrics[key] for row in some] for key in (name, "val_psnr"))
            lines.append(Line(x, y, name=label, joined=False, faint=not on_front))
        return Panel(title, "bits an image", "PSNR, dB", [line for line in lines if line.x])

    return [panel("code_bits", "Stored bits"), panel("code_bits_entropy", "Of them the encoder's own noise")]
