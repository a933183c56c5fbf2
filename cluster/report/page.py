"""The report of an experiment: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from mlflow.entities import Run as RecordedRun
from PIL import Image

from bld_core.data.pictures import png
from bld_core.storage import files
from bld_core.storage.records import Part, read_part, read_record
from bld_core.trained import AutoencoderRecord
from cluster.config.artifacts import open_trained
from cluster.config.experiment import Experiment
from cluster.evaluation.evaluate import REPORT, read_report
from cluster.lineage import git_commit, lineage
from cluster.plots import Line, Panel, bit_usage_figure, panels_figure, svg
from cluster.report.paper import PaperTable, tables_for
from cluster.report.tables import GROUPS, about, rank, shown_metrics
from cluster.secrets import without_secrets
from cluster.stages import RECORD
from cluster.tracking.runs import STARTS, find_run
from cluster.tracking.store import open_client, patiently

_TEMPLATE = Path(__file__).with_name("report.html")
_STAGES = ("autoencoder", "decoder", "latents", "prior", "evaluation")
_PANEL = 3.6, 2.4  # inches of a drawing that has a third of the page
_HALF = 5.4, 2.7  # inches of a drawing that has half of the page
_WIDEST = 1600  # pixels of a picture in the page
_TILES = ("psnr", "ssim", "dead_bits", "bound", "fid", "class_accuracy")
_TRAINED = ("autoencoder", "decoder", "prior")
_NOT_LOSSES = tuple(
    f"train_{name}"
    for name in (
        "gradient_norm",
        "learning_rate",
        "skipped",
        "skipped_images",
        "adaptive",
        "adversarial",
        "critic",
        "lecam",
    )
)
_TIME = "%Y-%m-%d %H:%M UTC"
_CAPTIONS = {
    "samples.png": "Samples of the prior; a column for each class, where there are classes.",
    "reconstructions.png": "Held-out images; below each row its reconstructions, and the differences: grey is none.",
    "neighbours.png": "Samples, each before the training images nearest to it, nearest first, by {neighbours_by}.",
    "bound-profile.png": "What each step adds to the likelihood bound, which is the area.",
}
_DRAWN = "bit-usage.png"  # the page draws it again, in its own colours


def write_report(experiment: Experiment) -> str:
    """Evaluated experiment -> <folder>/evaluation/report.html: pictures, curves, metrics, and where they come from.

    Curves and command lines are those that MLflow holds; where it has lost a run, the page goes without.

    Args:
        experiment: evaluated; stage 1 alone, too.

    Returns:
        The path of the page.

    Raises:
        MissingError: not evaluated yet.
        UserError: evaluated with other weights than those that are there.
    """
    trained, folder = open_trained(experiment), files.join(experiment.folder, "evaluation")
    report = read_report(experiment.folder, trained)
    metrics, runs = report["figures"], _runs(experiment)
    shown = shown_metrics(metrics)
    made_from = lineage(trained.autoencoder, trained.prior).items()
    tables = tables_for(experiment.data.image_size, experiment.prior.classes)
    page = {
        "name": experiment.name,
        "summary": _summary(trained.autoencoder, report),
        "tiles": [shown[name] for name in _TILES if name in shown],
        "groups": {group: [row for row in shown.values() if row.group == group] for group in GROUPS},
        "pictures": _pictures(folder, report),
        "usage": svg(bit_usage_figure(torch.tensor(usage), _HALF)) if (usage := report.get("bit_usage")) else "",
        "curves": {run.info.run_name: _curves(experiment, run) for run in runs if run.info.run_name in _TRAINED},
        "tables": [_beside(table, experiment, metrics) for table in tables if metrics.keys() & table.columns.values()],
        "left_out": [table.title for table in tables if not metrics.keys() & table.columns.values()],
        "lineage": {tag.removeprefix("bld.").removesuffix("_hash"): value for tag, value in made_from},
        "runs": [_provenance(run) for run in runs],
        "parameters": {name: without_secrets(value) for name, value in experiment.parameters().items()},
        "written": f"{datetime.now(UTC):{_TIME}}",
        "commit": git_commit(),
    }
    page_url = files.join(folder, "report.html")
    files.write_bytes(page_url, rendered(_TEMPLATE, page))
    return page_url


def rendered(template: Path, page: Mapping[str, object]) -> bytes:
    """A page of its template, in the style of all pages."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Path(__file__).with_name("style.css").read_text()
    return environment.from_string(template.read_text()).render(page, style=style).encode()


def _runs(experiment: Experiment) -> list[RecordedRun]:
    """The MLflow runs that made the experiment, as far as they are there."""
    uri, patience = experiment.tracking.resolve(experiment.root), experiment.tracking.patience
    records = [files.join(experiment.folder, stage, RECORD) for stage in _STAGES]
    found = [find_run(uri, read_record(record)["run"], patience) for record in records if files.exists(record)]
    return [run for run in found if run is not None]


def _summary(autoencoder: AutoencoderRecord, report: Mapping[str, Any]) -> list[str]:
    size, channels, (h, w, c) = autoencoder.image_size, autoencoder.channels, autoencoder.code_shape
    binary = autoencoder.autoencoder.latent == "binary"
    latent = f"{h} x {w} x {c} bits, {h * w * c // 8:,} bytes" if binary else f"a {h} x {w} x {c} latent"
    lines = [f"images of {size} x {size} x {channels} as {latent}"]
    if "sampling" in report:
        sampling = report["sampling"]
        steps = len(sampling["grid"]) - 1 if sampling["grid"] else sampling["steps"]
        settings = f"temperature {sampling['temperature']:g}, guidance {sampling['guidance']:g}"
        low, high = sampling.get("guidance_interval", (0.0, 1.0))  # reports of early versions have none
        settings += f" at t/T of {low:g} to {high:g}" if sampling["guidance"] and high - low < 1 else ""
        lines.append(f"{report['samples']:,} samples of {steps} steps, {settings}")
    return lines


def _pictures(folder: str, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Data URI and caption of each picture of the evaluation."""
    found: list[tuple[str, str]] = []
    names = [name for name in files.listing(folder) if name.endswith(".png") and name != _DRAWN]
    for name in sorted(
        names, key=lambda name: (list(_CAPTIONS).index(name) if name in _CAPTIONS else len(_CAPTIONS), name)
    ):
        url, part = files.join(folder, name), report.get("files", {}).get(name)
        data = read_part(url, Part(**part), REPORT, ("evaluation",)) if part else files.read_bytes(url)
        picture = Image.open(io.BytesIO(data))
        if picture.width > _WIDEST:
            data = png(picture.resize((_WIDEST, picture.height * _WIDEST // picture.width), Image.Resampling.LANCZOS))
        caption = _CAPTIONS.get(name, name.removesuffix(".png").replace("-", " "))
        caption = caption.format(neighbours_by=report.get("neighbours_by", ""))
        found.append((f"data:image/png;base64,{base64.b64encode(data).decode()}", caption))
    return found


def _curves(experiment: Experiment, run: RecordedRun) -> list[str]:
    """Diagrams of a training run: the loss and its terms, the held-out metrics, how the steps went."""
    uri, patience = experiment.tracking.resolve(experiment.root), experiment.tracking.patience
    client, known = open_client(uri, patience), run.data.metrics

    def history(key: str) -> dict[int, float]:
        points = patiently(uri, patience, lambda: client.get_metric_history(run.info.run_id, key))
        return {point.step: point.value for point in points}

    def line(key: str) -> Line:
        values = dict(sorted(history(key).items()))
        errors = history(f"{key}_se") if f"{key}_se" in known else {}
        error = [errors.get(step, 0.0) for step in values] if errors else []
        return Line(thinned(list(values)), thinned(list(values.values())), thinned(error), key.partition("_")[2])

    keys = [key for key in known if key.startswith(("train_", "val_")) and not key.endswith("_se")]
    terms = sorted(key for key in keys if key.startswith("train_") and key not in _NOT_LOSSES)
    losses = list({tuple(curve.y): curve for curve in map(line, terms)}.values())  # a loss of one term is that term
    panels = [Panel("loss", "step", "", losses)] if losses else []
    for key in sorted(
        set(keys) - set(terms), key=lambda key: (key.startswith("train_"), rank(key.partition("_")[2]), key)
    ):
        title = about(key.partition("_")[2]).title
        panels.append(Panel(f"{title}, held-out" if key.startswith("val_") else title, "step", "", [line(key)]))
    return [svg(panels_figure([panel], _PANEL)) for panel in panels]


def thinned(values: Sequence[float], most: int = 400) -> list[float]:
    """At most so many numbers, each the mean of its neighbours."""
    share = max(1, -(-len(values) // most))
    return [fmean(values[i : i + share]) for i in range(0, len(values), share)]


def _beside(table: PaperTable, experiment: Experiment, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Our row above the paper's, of which those of the same images are marked."""
    ours = [f"{metrics[metric]:.2f}" if metric in metrics else "-" for metric in table.columns.values()]
    rows = [("ours", f"this experiment, {experiment.name}", ours)]
    for row in table.rows:
        kind = "same" if experiment.name in row.experiments else ""
        rows.append((kind, row.name, [f"{value:.2f}" for value in row.values]))
    return {"title": table.title, "columns": list(table.columns), "rows": rows}


def _provenance(run: RecordedRun) -> dict[str, Any]:
    """Of a stage: its run, how long it took, and every start of it."""
    begin, end = run.info.start_time, run.info.end_time
    return {
        "stage": run.info.run_name,
        "run": run.info.run_id,
        "status": run.info.status.lower(),
        "took": f"{timedelta(milliseconds=end - begin)}".partition(".")[0] if end else "",
        "starts": [line.split(" ", 2) for line in run.data.tags.get(STARTS, "").splitlines()],
    }
