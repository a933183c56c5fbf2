"""Evaluation of a finished experiment on a pool of actors; the driver merges what they have seen."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from bld_core.data.images import check_shards
from bld_core.data.pictures import fitting, grid, png, reconstruction_grid
from bld_core.diffusion.bound import Bound, merge_bounds
from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.storage import files
from bld_core.storage.records import (
    Fault,
    named_faults,
    part_of,
    part_of_file,
    read_record,
    set_aside,
    write_record,
)
from bld_core.storage.weights import VGG16
from cluster.config.artifacts import Artifacts, open_finished
from cluster.config.experiment import Experiment
from cluster.data.check import Shards, check_data
from cluster.evaluation.actors import CALLS, Drawn, Evaluator, Reconstruct, Reconstructions, SampleFeatures
from cluster.evaluation.cas import cas_experiment, measure_cas
from cluster.evaluation.neighbours import find_neighbours
from cluster.evaluation.pieces import KeptPieces, Piece, Result
from cluster.evaluation.references import Reference, Space, check_space, make_reference, spaces_of
from cluster.evaluation.sample_metrics import SAMPLES, SHOWN, Samples, check_references, over_seeds
from cluster.lineage import lineage
from cluster.plots import bit_usage_plot, profile_plot
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import MeasureBound, balanced_labels, bound_pieces, draw_pieces, drawn_labels
from cluster.stages import Stage, open_stage

REPORT = "report.json"
_MEASURED, _PIECES = "measured.json", "pieces"
_PICTURE_IMAGES = 32
# Of the work, not of what is measured: metrics are the same whatever these are.
_NOT_MEASURED = ("batch_size", "neighbours", "export")


@dataclass(frozen=True)
class Inputs:
    """What an evaluation works with, opened and checked before anything is started.

    Attributes:
        experiment: its configuration.
        artifacts: the autoencoder; with a prior, that and its latents.
        shards: of held-out images.
        train_shards: of training images, where samples are compared with them; else none.
        spaces: in whose features images are compared.
        identity: what decides the report.
    """

    experiment: Experiment
    artifacts: Artifacts
    shards: list[str]
    train_shards: list[str]
    spaces: Sequence[Space]
    identity: Mapping[str, object]

    @property
    def has_prior(self) -> bool:
        """Whether samples can be drawn; else it is stage 1 alone that is evaluated."""
        return self.artifacts.prior is not None


@dataclass
class Measured:
    """What the actors have found.

    Attributes:
        samples: drawn images, a set for each seed; none without a prior.
        reconstructions: of held-out images.
        bounds: of all steps, of parts of the held-out codes.
        bounds_sampling: the same of the steps sampled.
    """

    samples: list[Samples] = field(default_factory=list)
    reconstructions: Reconstructions = field(default_factory=Reconstructions)
    bounds: list[Bound] = field(default_factory=list)
    bounds_sampling: list[Bound] = field(default_factory=list)


def evaluate(experiment: Experiment, fresh: bool = False) -> dict[str, Any]:
    """Finished experiment -> <folder>/evaluation: report.json and pictures, and the samples where they are exported.

    Where there is no prior (yet), it is stage 1 alone that is evaluated, whatever its latent. Samples are drawn,
    decoded, rounded and their features taken by the actors; see `Samples` for what grows with their number.

    Args:
        experiment: its configuration.
        fresh: evaluate again even if the same report is there.

    Returns:
        The report: metrics by name.

    Raises:
        MissingError: stage 1 is not finished, or weights of an extractor are missing.
        UserError: bad input, before anything is started.
    """
    inputs = _open(experiment)
    artifacts, fingerprint = inputs.artifacts, inputs.identity
    reads = inputs.shards[:1]
    with open_stage(
        experiment, "evaluation", fingerprint, REPORT, fresh=fresh, on_change="redo", reads=reads, decodes=True
    ) as stage:
        report_url, measured_url = (stage.url(name) for name in (REPORT, _MEASURED))
        if stage.done:
            return read_record(report_url)
        stage.run.tags(lineage(artifacts.autoencoder, artifacts.prior))
        pictures: dict[str, Image.Image] = {}
        if not _is_whole(stage.folder):  # kept before what may wait for a server, or be interrupted in training
            report, pictures = _measured(inputs, stage)
            parts: dict[str, dict[str, int | str]] = {}
            for name, picture in pictures.items():
                data = png(picture)
                parts[name] = part_of(data)
                files.write_bytes(stage.url(name), data)
            if files.exists(npz := stage.url(SAMPLES)):
                parts[SAMPLES] = part_of_file(npz)
            about = {"protocol": _protocol(fingerprint), "pictures": [*pictures], "files": parts}
            write_record(measured_url, report | about | artifacts.identity)
        files.remove(stage.url(_PIECES))
        report = read_record(measured_url)
        if inputs.has_prior and experiment.evaluation.cas_steps:
            report["figures"] |= measure_cas(cas_experiment(experiment), inputs.shards, fingerprint)
        for name in report.pop("pictures"):
            stage.run.picture(pictures[name] if name in pictures else _picture(stage.url(name)), name)
        stage.run.metrics(report["figures"], 0)
        write_record(report_url, report)
        return report


def _picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(files.read_bytes(url)))


def _is_whole(folder: str) -> bool:
    """Whether all was measured by an earlier start, and is as that has written it; what is not is set aside."""
    url = files.join(folder, _MEASURED)
    if not files.exists(url):
        return False
    try:
        faults = named_faults(folder, read_record(url), _MEASURED)
    except DamagedError as error:
        faults = [Fault(error.url, error.reason)]
    for fault in faults:
        aside = f", and is set aside as {set_aside(fault.url)!r}" if files.exists(fault.url) else ""
        print(f"evaluation: {fault.url!r} {fault.reason}{aside}; all is measured again", flush=True)
    return not faults


def check_evaluation(experiment: Experiment) -> None:
    """Find what an evaluation needs beside models and data, which a command that trains before it does first.

    Raises:
        MissingError: weights of an extractor are missing.
        UserError: others than their sha256 says, images without classes to train a classifier on, or too few samples.
    """
    config, loss = experiment.evaluation, experiment.loss
    if config.lpips:
        VGG16.find(loss.vgg_weights, loss.vgg_sha256)
    for space in spaces_of(experiment):
        check_space(experiment, space)
    if config.cas_steps:
        cas_experiment(experiment)


def _open(experiment: Experiment) -> Inputs:
    """Find models, images, latents, and weights of extractors that are asked for, before anything is started."""
    config, loss = experiment.evaluation, experiment.loss
    artifacts, spaces = open_finished(experiment), spaces_of(experiment)
    has_prior = artifacts.prior is not None
    if has_prior:
        artifacts.model.steps(experiment.sampling)
    compared = bool(spaces) or (has_prior and bool(config.neighbours or config.class_accuracy))
    shards = check_data(experiment) if compared else Shards([], check_shards(experiment.data, "validation"))
    check_evaluation(experiment)
    identity = {
        **artifacts.identity,
        **experiment.fingerprint("data", "sampling", "evaluation"),
        "vgg_sha256": loss.vgg_sha256,
        "shards": files.fingerprint(shards.validation),
    }
    if compared:
        identity["train_shards"] = files.fingerprint(shards.train)
    if config.classifier:
        identity["classifier_steps"] = experiment.study.classifier_steps
    return Inputs(experiment, artifacts, shards.validation, shards.train, spaces, identity)


def _measured(inputs: Inputs, stage: Stage) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """What the report says of reconstructions and, where there is a prior, of bound and samples; and its pictures."""
    experiment = inputs.experiment
    config, size = experiment.evaluation, experiment.data.image_size
    references: list[Reference] = []
    if inputs.has_prior:
        references = [make_reference(experiment, s, inputs.train_shards, inputs.shards) for s in inputs.spaces]
    check_references(config, references)
    found = _measure(inputs, references, stage)
    reconstructions = found.reconstructions
    metrics = reconstructions.metrics(experiment.loss.vgg_sha256)
    trained = inputs.artifacts.autoencoder
    bits = trained.autoencoder.code_bits(trained.image_size)
    if bits is not None:
        metrics["code_bits"] = bits
    report: dict[str, Any] = {"figures": metrics}
    pictures = {
        "reconstructions.png": reconstruction_grid(*reconstructions.pictures(fitting(size, _PICTURE_IMAGES, 3)))
    }
    health = reconstructions.sums.health
    if health.count and bits is not None:
        metrics["code_bits_entropy"] = bits * metrics["bit_entropy"]
        report["bit_usage"] = health.usage.tolist()
        pictures["bit-usage.png"] = bit_usage_plot(health.usage)
    if not inputs.has_prior:
        return report, pictures
    shown = found.samples[0].shown
    bound, sampled = merge_bounds(found.bounds), merge_bounds(found.bounds_sampling)
    metrics |= {"bound": bound.bits_per_bit, "bound_se": bound.standard_error}
    if bits is not None:
        metrics |= {"code_bits_bound": bits * bound.bits_per_bit, "code_bits_bound_se": bits * bound.standard_error}
    metrics |= {"bound_sampling": sampled.bits_per_bit, "bound_sampling_se": sampled.standard_error}
    metrics |= over_seeds([samples.metrics() for samples in found.samples])
    pictures["bound-profile.png"] = profile_plot(bound.profile)
    columns = inputs.artifacts.classes or 10
    prior, balanced = inputs.artifacts.prior, config.labels == "balanced"
    names = prior.headings(range(columns)) if prior is not None and balanced else []
    pictures["samples.png"] = grid(shown[: fitting(size, len(shown))], columns, names)
    report |= {"bound_profile": bound.profile, "samples": config.samples}
    steps = inputs.artifacts.model.steps(experiment.sampling)
    report["sampling"] = {**asdict(experiment.sampling), "steps": steps}
    report["references"] = {made.space.name: made.hash for made in references}
    if config.neighbours:
        near = find_neighbours(experiment, inputs.train_shards, shown, inputs.spaces)
        metrics |= near.metrics
        pictures["neighbours.png"], report["neighbours_by"] = near.picture, near.space
    return report, pictures


def read_report(folder: str, trained: Artifacts) -> dict[str, Any]:
    """The report of what is trained.

    Args:
        folder: of the experiment.
        trained: the autoencoder, and the prior where there is one.

    Raises:
        MissingError: not evaluated yet.
        DamagedError: the report is damaged.
        UserError: it is about other weights.
    """
    url = files.join(folder, "evaluation", REPORT)
    if not files.exists(url):
        raise MissingError(f"{url!r} is missing: evaluate first", stages=("evaluation",))
    report = read_record(url, ("evaluation",))
    hashes = {"autoencoder_hash": trained.autoencoder.hash}
    if trained.prior is not None:
        hashes["prior_hash"] = trained.prior.hash
    for part, its in hashes.items():
        if report.get(part) != its:
            raise UserError(
                f"{url!r} has {part} {str(report.get(part))[:12]}, but the trained one is {its[:12]}: evaluate again",
                stages=("evaluation",),
            )
    return report


def _protocol(fingerprint: Mapping[str, object]) -> str:
    """A hash of what is measured, how and on which images: metrics of one protocol may be compared."""
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


def _labels(inputs: Inputs) -> list[int] | None:
    """The classes of all samples; None without classes."""
    experiment, classes = inputs.experiment, inputs.artifacts.classes
    total = experiment.evaluation.samples
    if experiment.evaluation.labels == "balanced" or not classes:
        return balanced_labels(total, classes)
    assert inputs.artifacts.codes is not None, "opened with the prior"
    latents, counts = inputs.artifacts.codes.train, np.zeros(classes, np.int64)
    for shard in range(len(latents.shards)):
        labels = latents.read([shard]).labels
        counts += np.bincount(labels[labels >= 0], minlength=classes)
    if not counts.any():
        raise UserError("evaluation.labels is drawn, but no training image has a class: set it to balanced")
    return drawn_labels(counts.tolist(), total, experiment.seed)


def _sample_pieces(experiment: Experiment, labels: list[int] | None, folder: str) -> list[SampleFeatures]:
    """The samples, piece by piece; images are handed back where something is made of them."""
    config = experiment.evaluation
    all_pixels = config.export == "npz" or (config.class_accuracy and labels is not None)
    pieces: list[SampleFeatures] = []
    for draw in draw_pieces(experiment.sampling, labels, config.samples, config.batch_size, experiment.seed):
        png_folder = files.join(folder, "samples") if config.export == "png" else ""
        shard = files.join(folder, f"cas/samples/{draw.first_index:06d}.tar") if config.cas_steps else ""
        pieces.append(SampleFeatures(draw, all_pixels or draw.first_index < SHOWN, png_folder, shard))
    again = range(experiment.seed + 1, experiment.seed + config.seeds)
    return pieces + [SampleFeatures(replace(piece.draw, seed=seed)) for seed in again for piece in pieces]


def _measure(inputs: Inputs, references: Sequence[Reference], stage: Stage) -> Measured:
    """All pieces of work; each result is kept, added to what it belongs to, in their order, and then dropped.

    What an evaluation that was interrupted has kept is added as if it had been measured now.
    """
    experiment, codes = inputs.experiment, inputs.artifacts.codes
    config, seed = experiment.evaluation, experiment.seed
    shown = fitting(experiment.data.image_size, _PICTURE_IMAGES, 3)
    pieces: list[Piece] = [Reconstruct(url, shown) for url in inputs.shards]
    # Of stage 1 alone only published networks see reconstructions: no classifier is trained for them.
    spaces = [space for space in inputs.spaces if inputs.has_prior or space.name != "classifier"]
    found, npz, held_out = Measured(), contextlib.nullcontext(), None
    if codes is not None:
        held_out, labels = codes.held_out, _labels(inputs)
        pieces = [*_sample_pieces(experiment, labels, stage.folder), *pieces]
        pieces += bound_pieces(None, len(held_out)) + bound_pieces(experiment.sampling, len(held_out))
        plain = replace(config, class_accuracy=False)
        for number in range(config.seeds):
            found.samples.append(Samples(plain if number else config, experiment, references, labels))
        if config.export == "npz":
            npz = found.samples[0].exported(stage.folder)
    kept = KeptPieces(stage.url(_PIECES), experiment)
    missing = [piece for piece in pieces if piece not in kept]
    if len(missing) < len(pieces):
        print(f"evaluation: {len(pieces) - len(missing)} of {len(pieces)} pieces are there from an earlier start")
    arguments = (experiment, spaces, held_out)
    cluster, label = experiment.cluster, "evaluate"
    work = map_on_actors(Evaluator, arguments, "work", missing, cluster, label, CALLS, decodes=True)
    with contextlib.closing(work), npz:
        for piece in pieces:
            result: Result = kept.load(piece) if piece in kept else next(work)
            if piece not in kept:
                kept.keep(piece, result)
            if isinstance(result, Drawn):
                found.samples[result.seed - seed].add(result)
            elif isinstance(result, Reconstructions):
                found.reconstructions.merge(result)
            else:
                assert isinstance(piece, MeasureBound), "it was asked for a bound"
                (found.bounds if piece.sampling is None else found.bounds_sampling).append(result)
    found.reconstructions.skipped.check(experiment.data.max_skipped)
    return found
