"""Evaluation of a finished experiment on a pool of actors; the driver merges what they have seen."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

import bld_core
from bld_core.data.images import check_shards, first_images, stack
from bld_core.data.pictures import fitting, grid, png, reconstruction_grid
from bld_core.diffusion.bound import Bound, merge_bounds
from bld_core.errors import MissingError, UserError
from bld_core.generator import AUTOENCODER, PRIOR
from bld_core.latents.reader import open_latents
from bld_core.prior.model import trained_model
from bld_core.storage import files
from bld_core.storage.weights import VGG16
from bld_core.training.checkpoint import CONFIG, read_model_config
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import CALLS, Evaluator, Look, Reconstruct, Reconstructions
from cluster.evaluation.cas import cas_experiment, measure_cas
from cluster.evaluation.neighbours import find_neighbours
from cluster.evaluation.references import Reference, check_space, make_reference, spaces_of
from cluster.evaluation.sample_metrics import SHOWN, Samples, check_references, over_seeds
from cluster.lineage import lineage
from cluster.plots import bit_usage_plot, profile_plot
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import Judge, balanced_labels, drawn_labels, draws, judges
from cluster.stages import Stage, open_stage

_REPORT, _MEASURED = "report.json", "measured.json"
_PICTURE_IMAGES = 32
# Of the work, not of what is measured: figures are the same whatever these are.
_NOT_MEASURED = ("batch_size", "neighbours", "export")


@dataclass
class Measured:
    """What the actors have found.

    Attributes:
        samples: drawn images, a set for each seed; none without a prior.
        remade: held-out images and their reconstructions.
        bounds: of all steps, of parts of the held-out codes.
        bounds_sampling: the same of the steps sampled.
    """

    samples: list[Samples] = field(default_factory=list)
    remade: Reconstructions = field(default_factory=Reconstructions)
    bounds: list[Bound] = field(default_factory=list)
    bounds_sampling: list[Bound] = field(default_factory=list)


def evaluate(experiment: Experiment, fresh: bool = False) -> dict[str, Any]:
    """Finished experiment -> <folder>/evaluation: report.json and pictures, and the samples where they are exported.

    Where there is no prior (yet), it is stage 1 alone that is evaluated, whatever its latent. Samples are drawn,
    decoded, rounded and looked at by the actors; see `Samples` for what grows with their number.

    Args:
        experiment: its configuration.
        fresh: evaluate again even if the same report is there.

    Returns:
        The report: figures by name.

    Raises:
        MissingError: stage 1 is not finished, or weights of an extractor are missing.
        UserError: bad input, before anything is started.
    """
    autoencoder = read_model_config(files.join(experiment.folder, AUTOENCODER))
    has_prior = files.exists(files.join(experiment.folder, PRIOR, CONFIG))
    prior = read_model_config(files.join(experiment.folder, PRIOR)) if has_prior else None
    experiment.check_autoencoder(autoencoder, binary=has_prior)
    _check(experiment, prior)
    identity = {"autoencoder_hash": autoencoder["hash"]}
    if prior is not None:
        identity |= {"prior_hash": prior["hash"], "prior_run": prior["run"]}
    config = experiment.evaluation
    fingerprint = {
        **identity,
        **experiment.fingerprint("data", "sampling", "evaluation"),
        "vgg_sha256": experiment.loss.vgg_sha256,
        "shards": files.fingerprint(files.expand(experiment.data.validation)),
    }
    if spaces_of(experiment) or (prior is not None and (config.neighbours or config.class_accuracy)):
        fingerprint["train_shards"] = files.fingerprint(files.expand(experiment.data.train))
    if config.classifier:
        fingerprint["classifier_steps"] = experiment.study.classifier_steps
    with open_stage(experiment, "evaluation", fingerprint, _REPORT, fresh=fresh, on_change="redo") as stage:
        report_url, measured_url = (files.join(stage.folder, name) for name in (_REPORT, _MEASURED))
        if stage.done:
            return files.read_json(report_url)
        stage.run.tags(lineage(autoencoder, prior))
        if not files.exists(measured_url):  # kept before what may wait for a server, or be interrupted in training
            report, pictures = _measured(experiment, prior, stage)
            for name, picture in pictures.items():
                files.write_bytes(files.join(stage.folder, name), png(picture))
            about = {"protocol": _protocol(fingerprint), "pictures": [*pictures], **identity}
            files.write_json(measured_url, report | about)
        report = files.read_json(measured_url)
        if prior is not None and config.cas_steps:
            report["figures"] |= measure_cas(cas_experiment(experiment), fingerprint)
        for name in report.pop("pictures"):
            picture = Image.open(io.BytesIO(files.read_bytes(files.join(stage.folder, name))))
            stage.run.picture(picture, name)
        stage.run.metrics(report["figures"], 0)
        files.write_json(report_url, report)
        return report


def _measured(
    experiment: Experiment, prior: dict[str, Any] | None, stage: Stage
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """What the report says of reconstructions and, where there is a prior, of bound and samples; and its pictures."""
    spaces = spaces_of(experiment)
    references = [make_reference(experiment, space) for space in spaces] if prior is not None else []
    check_references(experiment.evaluation, references)
    found = _measure(experiment, prior, references, stage)
    figures, pictures = found.remade.figures(experiment.loss.vgg_sha256), _reconstructions(experiment)
    report: dict[str, Any] = {"figures": figures}
    if found.remade.health.count:
        report["bit_usage"] = found.remade.health.usage.tolist()
        pictures["bit-usage.png"] = bit_usage_plot(found.remade.health.usage)
    if prior is None:
        return report, pictures
    shown = found.samples[0].shown
    bound, sampled = merge_bounds(found.bounds), merge_bounds(found.bounds_sampling)
    figures |= {"bound": bound.bits_per_bit, "bound_se": bound.standard_error}
    figures |= {"bound_sampling": sampled.bits_per_bit, "bound_sampling_se": sampled.standard_error}
    figures |= over_seeds([samples.figures() for samples in found.samples])
    pictures["bound-profile.png"] = profile_plot(bound.profile)
    columns = prior["prior"]["classes"] or 10
    pictures["samples.png"] = grid(shown[: fitting(experiment.data.image_size, len(shown))], columns)
    steps = trained_model(prior, experiment.code_shape).steps(experiment.sampling)
    report |= {"bound_profile": bound.profile, "samples": experiment.evaluation.samples}
    report["sampling"] = {**asdict(experiment.sampling), "steps": steps}
    report["references"] = {made.space.name: made.hash for made in references}
    if experiment.evaluation.neighbours:
        near = find_neighbours(experiment, shown, spaces)
        figures |= near.figures
        pictures["neighbours.png"], report["neighbours_by"] = near.picture, near.space
    return report, pictures


def read_report(experiment: Experiment) -> dict[str, Any]:
    """The report of the pair, or of the autoencoder, that is in the experiment's folder now.

    Raises:
        MissingError: not evaluated yet.
        UserError: the report is about other weights.
    """
    url = files.join(experiment.folder, "evaluation", _REPORT)
    if not files.exists(url):
        raise MissingError(f"{url!r} is missing: run evaluate.py first")
    report = files.read_json(url)
    for part, place in (("autoencoder_hash", AUTOENCODER), ("prior_hash", PRIOR)):
        if files.exists(files.join(experiment.folder, place, CONFIG)):
            trained = read_model_config(files.join(experiment.folder, place))["hash"]
            if report.get(part) != trained:
                raise UserError(
                    f"{url!r} has {part} {str(report.get(part))[:12]}, but the trained one is {trained[:12]}: run "
                    "evaluate.py again"
                )
    return report


def _protocol(fingerprint: dict[str, Any]) -> str:
    """A hash of what is measured, how and on which images: figures of one protocol may be compared."""
    images = {
        "shards",
        "train_shards",
        "data.image_size",
        "data.channels",
        "data.fit",
        "vgg_sha256",
        "classifier_steps",
    }
    decides = {name: value for name, value in fingerprint.items() if name in images or name.startswith("evaluation.")}
    for name in _NOT_MEASURED:
        decides.pop(f"evaluation.{name}")
    return files.sha256(json.dumps(decides, sort_keys=True).encode())


def _check(experiment: Experiment, prior: dict[str, Any] | None) -> None:
    """Find the images, latents, and weights of extractors that are asked for, before anything is started."""
    config, loss = experiment.evaluation, experiment.loss
    if prior is not None:
        trained_model(prior, experiment.code_shape).steps(experiment.sampling)
        latents = open_latents(files.join(experiment.folder, "latents"))
        if latents.hash != prior["latents_hash"]:
            raise UserError(
                f"the prior in {experiment.folder!r} was trained on latents {prior['latents_hash'][:12]}, but those "
                f"there are {latents.hash[:12]}: bring the former back, or train the prior on these by "
                "stage2_prior.py --fresh"
            )
    check_shards(experiment.data, "validation")
    if config.lpips:
        VGG16.find(loss.vgg_weights, loss.vgg_sha256)
    for space in spaces_of(experiment):
        check_space(experiment, space)
    if config.cas_steps:
        cas_experiment(experiment)


def _labels(experiment: Experiment, classes: int) -> list[int] | None:
    """The classes of all samples; None without classes."""
    total = experiment.evaluation.samples
    if experiment.evaluation.labels == "balanced" or not classes:
        return balanced_labels(total, classes)
    latents, counts = open_latents(files.join(experiment.folder, "latents")), np.zeros(classes, np.int64)
    for shard in range(len(latents.shards)):
        labels = latents.read([shard]).labels
        counts += np.bincount(labels[labels >= 0], minlength=classes)
    if not counts.any():
        raise UserError("evaluation.labels is drawn, but no training image has a class: set it to balanced")
    return drawn_labels(counts.tolist(), total, experiment.seed)


def _looks(experiment: Experiment, labels: list[int] | None, folder: str) -> list[Look]:
    """The samples, piece by piece; images are handed back where something is made of them."""
    config = experiment.evaluation
    all_pixels = config.export == "npz" or (config.class_accuracy and labels is not None)
    looks: list[Look] = []
    for draw in draws(experiment.sampling, labels, config.samples, config.batch_size, experiment.seed):
        png_folder = files.join(folder, "samples") if config.export == "png" else ""
        shard = files.join(folder, f"cas/samples/{draw.first_index:06d}.tar") if config.cas_steps else ""
        looks.append(Look(draw, all_pixels or draw.first_index < SHOWN, png_folder, shard))
    again = range(experiment.seed + 1, experiment.seed + config.seeds)
    return looks + [Look(replace(look.draw, seed=seed)) for seed in again for look in looks]


def _measure(
    experiment: Experiment, prior: dict[str, Any] | None, references: list[Reference], stage: Stage
) -> Measured:
    """All pieces of work; each result is added to what it belongs to, in their order, and then dropped."""
    config, seed = experiment.evaluation, experiment.seed
    pieces: list[Look | Judge | Reconstruct] = [Reconstruct(url) for url in check_shards(experiment.data, "validation")]
    # Of stage 1 alone only published networks look at reconstructions: no classifier is trained for them.
    spaces = [space for space in spaces_of(experiment) if prior is not None or space.name != "classifier"]
    found, npz = Measured(), contextlib.nullcontext()
    if prior is not None:
        labels = _labels(experiment, prior["prior"]["classes"])
        held_out = len(open_latents(files.join(experiment.folder, "latents"), "validation"))
        pieces = [*_looks(experiment, labels, stage.folder), *pieces]
        pieces += judges(None, held_out) + judges(experiment.sampling, held_out)
        plain = replace(config, class_accuracy=False)
        for number in range(config.seeds):
            found.samples.append(Samples(plain if number else config, experiment, references, labels))
        if config.export == "npz":
            npz = found.samples[0].exported(stage.folder)
    work = map_on_actors(Evaluator, (experiment, spaces), "work", pieces, experiment.cluster, "evaluate", CALLS)
    with contextlib.closing(work), npz:
        for piece, result in zip(pieces, work, strict=True):
            match piece:
                case Look():
                    found.samples[result.seed - seed].add(result)
                case Reconstruct():
                    found.remade.merge(result)
                case Judge():
                    (found.bounds if piece.sampling is None else found.bounds_sampling).append(result)
    found.remade.skipped.check(experiment.data.max_skipped)
    return found


def _reconstructions(experiment: Experiment) -> dict[str, Image.Image]:
    count = fitting(experiment.data.image_size, _PICTURE_IMAGES, 3)
    pixels = stack(first_images(experiment.data.validation, experiment.data, count))
    return {"reconstructions.png": reconstruction_grid(pixels, bld_core.load(experiment.folder).reconstruct(pixels))}
