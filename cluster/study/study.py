"""Studies: what one choice does to the prior and its samples, as one table and one plot (Tables 5, 7, Figs. 4, 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import yaml
from PIL.Image import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from bld_core.data.images import check_shards
from bld_core.data.pictures import png
from bld_core.errors import UserError
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.storage import files
from bld_core.storage.records import read_record
from bld_core.storage.weights import EFFICIENTNET_LITE0
from bld_core.trained import read_prior
from cluster.config.artifacts import Codes, open_encoded
from cluster.config.experiment import Experiment
from cluster.console import aligned
from cluster.evaluation.actors import Evaluator, Reconstruct, Reconstructions, SampleFeatures
from cluster.evaluation.references import Reference, Space, make_references
from cluster.evaluation.sample_metrics import SampleMetrics, over_seeds
from cluster.plots import Line, Panel, panels_plot
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import MeasureBound, balanced_labels, draw_pieces
from cluster.stages import open_stage
from cluster.study.rows import PAPER, STUDIES, StudyName, StudyRow, trainings
from cluster.training.train import train_prior

_RECONSTRUCTIONS = "rows/reconstructions.json"
_HELD_OUT = "rows/held-out.safetensors"
BEST = "best.yaml"
"""What the study sampling found best, as settings."""


def run_study(experiment: Experiment, name: StudyName, fresh: bool = False) -> dict[str, Any]:
    """Latents, and what the study compares -> <folder>/study/<name>: table.json, table.txt, plot.png.

    The study sampling also leaves best.yaml, the settings whose samples are nearest to held-out images. Priors that are
    there are used, others trained, each an experiment of its own; a study that was interrupted goes on after its last
    row.

    Args:
        experiment: its configuration.
        name: of the study.
        fresh: train the variants again, though never the experiment's own prior, and measure again.

    Returns:
        The table: "rows", each with its metrics by name, and what they were measured with.

    Raises:
        MissingError: no autoencoder or no latents yet.
        UserError: bad input, before anything is trained.
    """
    study, config = experiment.study, experiment.prior
    if config.model != "binary":
        raise UserError(f"prior.model is {config.model}; studies start from binary diffusion: set it to binary")
    column, make_rows = STUDIES[name]
    compared = make_rows(experiment)
    if not compared:
        raise UserError(f"study.steps is {study.steps}; at least one must be at most T = {experiment.diffusion.steps}")
    rows = [training for row in compared for training in trainings(experiment, row)]
    codes = open_encoded(experiment).codes
    assert codes is not None, "`open_encoded` opens them"
    [reference] = make_references(experiment, [study_space(experiment)])
    variants = {row.experiment.folder: row.experiment for row in rows}
    trained = {
        folder: _trained_hash(variant, fresh and folder != experiment.folder, experiment.folder)
        for folder, variant in variants.items()
    }
    fingerprint = {
        "reference": reference.hash,
        "rows": [[row.label, trained[row.experiment.folder], asdict(row.sampling), list(row.bounds)] for row in rows],
        "samples": study.samples,
        "codes": study.codes,
        **experiment.fingerprint(),
    }
    with open_stage(
        experiment, f"study/{name}", fingerprint, "table.json", fresh=fresh, on_change="redo", decodes=True
    ) as stage:
        if not stage.done:
            source, paper = PAPER.get(name, ("", {}))
            found: list[dict[str, Any]] = []
            unseen = name == "sampling"
            measured = _measure(experiment, rows, stage.folder, reference, codes, unseen=unseen)
            of_rows = zip(*[measured] * study.seeds, strict=True)  # the trainings of a row follow one another
            for row, several in zip(compared, of_rows, strict=True):
                metrics = over_seeds(several)
                stage.run.metrics(metrics, len(found))
                x = row.label if row.x is None else row.x
                about = {column: row.label, "x": x, "line": row.line, "paper": paper.get(row.label, ())}
                found.append(about | metrics)
            made = {
                "study": name,
                "column": column,
                "rows": found,
                "paper": source,
                "distance": reference.space.metric_name("fd"),
                "reference": reference.metrics | files.read_json(stage.url(_RECONSTRUCTIONS)),
                "samples": study.samples,
                "seeds": study.seeds,
                "sampling": asdict(experiment.sampling),
            }
            if unseen:
                made["best"] = _best(experiment, compared, made)
                best = {"sampling": made["best"]["sampling"]}
                files.write_bytes(stage.url(BEST), yaml.safe_dump(best).encode())
            picture = _plot(made)
            stage.run.picture(picture, "plot.png")
            stage.run.text(study_table(made), "table.txt")
            stage.write("plot.png", png(picture))
            stage.write("table.txt", f"{study_table(made)}\n".encode())
            stage.write("table.json", files.json_bytes("table.json", made))
        return read_record(stage.url("table.json"))


def _trained_hash(variant: Experiment, fresh: bool, source: str) -> str:
    """Train a variant, unless it is there; the hash of its prior."""
    train_prior(variant, fresh, source=source)
    return read_prior(variant.folder).hash


def study_space(experiment: Experiment) -> Space:
    """Where a study compares images: Inception's or EfficientNet-lite0's features, or else a classifier's."""
    config = experiment.evaluation
    if config.frechet:
        return Space("inception", config.inception_sha256)
    if config.efficientnet_lite0:
        return Space("efficientnet_lite0", EFFICIENTNET_LITE0.sha256)
    return Space("classifier")


def _measure(
    experiment: Experiment, rows: Sequence[StudyRow], folder: str, reference: Reference, codes: Codes, *, unseen: bool
) -> Iterator[dict[str, float]]:
    """The metrics of each row, kept in a file of its own, so that none is measured twice; so are reconstructions'.

    Where `unseen`, the distance to held-out images is one of them.
    """
    reconstructions_url, held_out_url = (files.join(folder, name) for name in (_RECONSTRUCTIONS, _HELD_OUT))
    urls = [files.join(folder, "rows", f"{number}.json") for number in range(len(rows))]
    held_out = [] if files.exists(reconstructions_url) else check_shards(experiment.data, "validation")
    open_rows = [row for row, url in zip(rows, urls, strict=True) if not files.exists(url)]
    pieces: list[Reconstruct | MeasureBound | SampleFeatures] = [Reconstruct(url) for url in held_out]
    pieces += [piece for row in open_rows for piece in _pieces(experiment, row)]
    plain = replace(experiment.evaluation, lpips=False, inception_score=False, kid=False)  # no study shows them
    experiment = replace(experiment, evaluation=plain)
    arguments = (experiment, [reference.space], codes.held_out)
    work = map_on_actors(Evaluator, arguments, "work", pieces, experiment.cluster, "measure", decodes=True)
    with contextlib.closing(work):
        if held_out:
            found = Reconstructions()
            for _ in held_out:
                found.merge(next(work))
            distance = frechet_distance(reference.moments, found.reconstructed[reference.space])
            real = found.real[reference.space]
            moments = {"count": torch.tensor(real.count), "mean": real.mean, "scatter": real.scatter.contiguous()}
            files.write_bytes(held_out_url, save_tensors(moments))
            files.write_json(reconstructions_url, {f"{reference.space.metric_name('fd')}_reconstructed": distance})
        compared = None
        if unseen:
            moments = load_tensors(files.read_bytes(held_out_url))
            compared = FeatureMoments(int(moments["count"]), moments["mean"], moments["scatter"])
        for row, url in zip(rows, urls, strict=True):
            if not files.exists(url):
                files.write_json(url, _metrics(row, work, experiment, reference, compared))
            yield files.read_json(url)


def _pieces(experiment: Experiment, row: StudyRow) -> list[MeasureBound | SampleFeatures]:
    """What has to be done for a row: its bounds, then its samples."""
    total, batch, prior = experiment.study.samples, experiment.evaluation.batch_size, row.experiment.folder
    labels = balanced_labels(total, experiment.prior.classes)
    drawn = draw_pieces(row.sampling, labels, total, batch, row.experiment.seed)
    return [
        *(replace(bound, prior=prior) for bound in row.bounds.values()),
        *(SampleFeatures(replace(draw, prior=prior)) for draw in drawn),
    ]


def _metrics(
    row: StudyRow, work: Iterator[Any], experiment: Experiment, reference: Reference, held_out: FeatureMoments | None
) -> dict[str, float]:
    """Take from the stream of results those of one row; `held_out` are moments to be compared with, too."""
    total, distance = experiment.study.samples, reference.space.metric_name("fd")
    metrics: dict[str, float] = {}
    for name in row.bounds:
        bound = next(work)
        metrics |= {name: bound.bits_per_bit, f"{name}_se": bound.standard_error}
    as_many = replace(reference, features=reference.features[:total])  # precision and recall are of sets of one size
    samples, moments, seconds = SampleMetrics(experiment.evaluation, as_many, experiment.seed), FeatureMoments(), 0.0
    while moments.count < total:
        drawn = next(work)
        features = drawn.features[reference.space.name]
        moments.update(features)
        samples.update(features, None, drawn.first_index)
        seconds += drawn.seconds
    metrics |= samples.metrics()
    if held_out is not None:
        metrics[f"{distance}_to_held_out"] = frechet_distance(held_out, moments)
    return metrics | {"seconds": seconds / total}


def _best(experiment: Experiment, rows: Sequence[StudyRow], made: dict[str, Any]) -> dict[str, Any]:
    """The settings whose samples are nearest to held-out images, what others are left as they are; and the cost."""
    name = f"{made['distance']}_to_held_out"
    number = min(range(len(rows)), key=lambda row: made["rows"][row][name])
    sampling = asdict(rows[number].sampling)
    seconds = sum(row["seconds"] for row in made["rows"]) * experiment.study.samples * experiment.study.seeds
    varied = ("temperature", "guidance", "guidance_interval")
    return {"row": number, "seconds": seconds, "sampling": {field: sampling[field] for field in varied}}


def _names(made: dict[str, Any]) -> list[str]:
    """The metrics of a table's rows, without their errors and deviations."""
    about = (made["column"], "x", "line", "paper")
    return [name for name in made["rows"][0] if name not in about and not name.endswith(("_se", "_sd"))]


def _error(seeds: int) -> str:
    """How the names end of what metrics stand with: their deviation over trainings, or the error of one."""
    return "_sd" if seeds > 1 else "_se"


def study_table(made: dict[str, Any]) -> str:
    """A study as lines of text, the paper's metrics beside ours."""
    names, distance = _names(made), made["distance"]
    cells = [[made["column"], *names, *([f"the paper ({made['paper']})"] if made["paper"] else [])]]
    seeds = made.get("seeds", 1)
    error = _error(seeds)
    for row in made["rows"]:
        shown = [
            f"{row[n]:.4f} +- {found:.4f}" if (found := row.get(f"{n}{error}")) else f"{row[n]:.3g}" for n in names
        ]
        cells.append(
            [row[made["column"]], *shown, *([" / ".join(f"{x:g}" for x in row["paper"])] if made["paper"] else [])]
        )
    lines = aligned(cells)
    real = made["reference"]
    early = real.get(f"{distance}_remade")  # what tables of early versions call it
    reconstructed = real.get(f"{distance}_reconstructed", early)
    if best := made.get("best"):
        own = ", ".join(f"{name} {made['sampling'][name]}" for name in best["sampling"])
        lines.append(
            f"nearest to held-out images: {made['rows'][best['row']][made['column']]}; the experiment's own is {own}; "
            f"to find it took {best['seconds']:.0f} s of drawing, {len(made['rows'])} times {made['samples']} samples"
        )
    if seeds > 1:
        lines.append(
            f"each row: the mean of {seeds} trainings, of seeds one after the other; +- their deviation (n - 1)"
        )
    lines += [
        "bounds: bits a bit of held-out codes; rows share codes and noise, so their differences are surer than +- says",
        f"{distance}: of {made['samples']} samples to the training images; held-out images have "
        f"{real[f'{distance}_held_out']:.3g}, their reconstructions {reconstructed:.3g}",
        "seconds: a sample, decoding included, in batches, of one worker",
    ]
    if any(name.startswith("recall") for name in names):
        lines.append(f"precision, recall: of these samples and {made['samples']} training images")
    if "classifier_accuracy" in real:
        lines.append(f"classifier: right on {real['classifier_accuracy']:.1%} of the held-out images")
    return "\n".join(lines)


def _plot(made: dict[str, Any]) -> Image:
    """The study as diagrams beside one another."""
    rows, distance, suffix = made["rows"], made["distance"], _error(made.get("seeds", 1))
    column = made["column"]
    if not isinstance(rows[0]["x"], str):  # of several settings the last is on the axis, the others name its lines
        column = column.split(", ")[-1]
    doubling = made["study"] in ("steps", "groups")
    strides = [name for name in _names(made) if name.startswith("bound_")]

    def panel(name: str, title: str, label: str) -> Panel:
        lines: list[Line] = []
        for line in dict.fromkeys(row["line"] for row in rows):
            some = [row for row in rows if row["line"] == line]
            error = [row[f"{name}{suffix}"] for row in some] if f"{name}{suffix}" in some[0] else []
            lines.append(Line([row["x"] for row in some], [row[name] for row in some], error, line))
        return Panel(title, column, label, lines, doubling)

    panels: list[Panel] = []
    if strides:
        lines = [
            Line(
                [int(name.removeprefix("bound_")) for name in strides],
                [row[name] for name in strides],
                [row[f"{name}{suffix}"] for name in strides],
                row[made["column"]],
            )
            for row in rows
        ]
        panels.append(Panel("Bound of chains of n steps", "n", "bits a bit", lines, doubling=True))
    elif "bound" in rows[0]:
        panels.append(panel("bound", "Likelihood bound", "bits a bit"))
    panels.append(panel(distance, "Frechet distance", distance))
    if made["study"] == "sampling":
        panels.append(panel(f"{distance}_to_held_out", "The same to held-out images", f"{distance}_to_held_out"))
    panels += [panel(name, "Recall", name) for name in _names(made) if name.startswith("recall")]
    if doubling:
        panels.append(panel("seconds", "Time", "seconds a sample, in batches"))
    if shown := [row for row in rows if row["paper"]]:
        line = Line([row["x"] for row in shown], [row["paper"][0] for row in shown])
        panels.append(Panel("The paper, LSUN Churches", column, "FID", [line], doubling))
    return panels_plot(panels)
