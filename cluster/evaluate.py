"""Evaluation of a finished experiment on a pool of actors; the driver merges their sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import bld_core
from bld_core import files
from bld_core.autoencoder import to_float, to_uint8
from bld_core.checkpoint import CONFIG, read_model_config
from bld_core.diffusion import Bound
from bld_core.generator import AUTOENCODER, PRIOR
from bld_core.images import check_shards, first_images, read_images, stack
from bld_core.losses import VGG16, load_perceptual
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.reconstruction import Moments, ReconstructionQuality
from bld_core.models import trained_model
from bld_core.pictures import grid, png, reconstruction_grid
from bld_core.quantizer import BernoulliBottleneck, CodeHealth
from bld_core.skipped import Skipped
from cluster.experiment import EvaluationConfig, Experiment
from cluster.features import INCEPTION, Inception, frechet_name
from cluster.plots import bit_usage_plot, profile_plot
from cluster.runtime import map_on_actors
from cluster.sample import Draw, Judge, Sampler
from cluster.stages import open_stage
from cluster.tracking import lineage

_PICTURE_IMAGES = 32
_PICTURE_SAMPLES = 80
_CLASSIFIER_IMAGES = 5000


@dataclass(frozen=True)
class Reconstruct:
    """Piece of work: reconstruct the images of one validation shard."""

    url: str


@dataclass
class Reconstructions:
    """What held-out images look like through their codes, from sums that merge."""

    quality: ReconstructionQuality = field(default_factory=ReconstructionQuality)
    lpips: Moments = field(default_factory=Moments)
    health: CodeHealth = field(default_factory=CodeHealth)
    real: FeatureMoments = field(default_factory=FeatureMoments)
    remade: FeatureMoments = field(default_factory=FeatureMoments)
    skipped: Skipped = field(default_factory=Skipped)

    def merge(self, other: Reconstructions) -> None:
        """Add another piece of work."""
        self.quality.merge(other.quality)
        self.lpips.merge(other.lpips)
        self.health.merge(other.health)
        self.real.merge(other.real)
        self.remade.merge(other.remade)
        self.skipped.merge(other.skipped)

    def figures(self, config: EvaluationConfig) -> dict[str, float]:
        """The figures by name; those that were asked for."""
        found = {
            "psnr": self.quality.psnr.mean,
            "psnr_std": self.quality.psnr.deviation,
            "ssim": self.quality.ssim.mean,
            "ssim_std": self.quality.ssim.deviation,
        }
        if self.health.count:  # there are bits
            found |= self.health.figures()
        if config.lpips:
            found |= {"lpips": self.lpips.mean, "lpips_std": self.lpips.deviation}
        if config.frechet:
            found[frechet_name("r", config.inception_sha256)] = frechet_distance(self.real, self.remade)
        if self.skipped.total:
            found["skipped_images"] = self.skipped.total
        return found


@dataclass
class Measured:
    """What the actors have found; where there is a prior, samples and bounds: of all steps, and of those sampled."""

    remade: Reconstructions = field(default_factory=Reconstructions)
    bounds: list[Bound] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


class Evaluator(Sampler):
    """An actor that judges reconstructions and, where there is a prior, draws samples and judges its bound."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        config, loss, device = experiment.evaluation, experiment.loss, self.generator.device
        self.perceptual = load_perceptual(loss, device) if config.lpips else None
        self.inception = (
            Inception(config.inception_weights, config.inception_sha256, device) if config.frechet else None
        )

    def work(self, piece: Reconstruct | Draw | Judge) -> Reconstructions | Tensor | Bound:
        """Do one piece: sums over reconstructions, images (uint8), or the bound."""
        match piece:
            case Reconstruct(url):
                return self._reconstruct(url)
            case Draw():
                return self.draw(piece)
            case Judge():
                return self.judge(piece)

    @torch.no_grad()
    def _reconstruct(self, url: str) -> Reconstructions:
        found, autoencoder = Reconstructions(), self.generator.autoencoder.network
        images = list(read_images(url, self.experiment.data, found.skipped))
        if not images:
            return found
        for batch in stack(images).split(self.experiment.latents.batch_size):
            x = to_float(batch.to(self.generator.device))
            features = autoencoder.encode(x)
            remade = to_uint8(autoencoder.decode(autoencoder.bottleneck(features)[0]))
            found.quality.update(batch, remade.cpu())
            if isinstance(autoencoder.bottleneck, BernoulliBottleneck):
                found.health.update(features)
            if self.perceptual is not None:
                found.lpips.update(self.perceptual(x, to_float(remade)))
            if self.inception is not None:
                found.real.update(self.inception(batch))
                found.remade.update(self.inception(remade))
        return found


def sample_labels(start: int, count: int, classes: int) -> list[int] | None:
    """Balanced classes: sample i is of class i mod classes; None without classes."""
    return [i % classes for i in range(start, start + count)] if classes else None


def evaluate(experiment: Experiment, fresh: bool = False) -> dict[str, Any]:
    """Finished experiment -> <folder>/evaluation: report.json and pictures.

    Where there is no prior (yet), it is stage 1 alone that is evaluated, whatever its latent.

    Args:
        experiment: its configuration.
        fresh: evaluate again even if the same report is there.

    Returns:
        The report: figures by name.

    Raises:
        FileNotFoundError: stage 1 is not finished.
    """
    autoencoder = read_model_config(files.join(experiment.folder, AUTOENCODER))
    has_prior = files.exists(files.join(experiment.folder, PRIOR, CONFIG))
    prior = read_model_config(files.join(experiment.folder, PRIOR)) if has_prior else None
    experiment.check_autoencoder(autoencoder, binary=has_prior)
    _check(experiment)
    identity = {"autoencoder_hash": autoencoder["hash"]}
    steps = 0
    if prior is not None:
        steps = trained_model(prior, experiment.code_shape).steps(experiment.sampling)
        identity |= {"prior_hash": prior["hash"], "prior_run": prior["run"]}
    fingerprint = {
        **identity,
        **experiment.fingerprint("data", "sampling", "evaluation"),
        "vgg_sha256": experiment.loss.vgg_sha256,
        "shards": files.fingerprint(files.expand(experiment.data.validation)),
    }
    with open_stage(experiment, "evaluation", fingerprint, "report.json", fresh=fresh, on_change="redo") as stage:
        report_url = files.join(stage.folder, "report.json")
        if stage.done:
            return files.read_json(report_url)
        stage.run.tags(lineage(autoencoder, prior))
        measured = _measure(experiment, prior)
        figures = measured.remade.figures(experiment.evaluation)
        pictures = _reconstructions(experiment)
        report: dict[str, Any] = {"figures": figures, "protocol": _protocol(fingerprint)}
        if measured.remade.health.count:
            report["bit_usage"] = measured.remade.health.usage.tolist()
            pictures["bit-usage.png"] = bit_usage_plot(measured.remade.health.usage)
        if prior is not None:
            classes = prior["prior"]["classes"]
            samples = torch.cat(measured.samples)
            figures |= _prior_figures(experiment, classes, measured, samples)
            pictures["bound-profile.png"] = profile_plot(measured.bounds[0].profile)
            pictures["samples.png"] = grid(samples[:_PICTURE_SAMPLES], classes or 10)
            report |= {"bound_profile": measured.bounds[0].profile, "samples": len(samples)}
            report["sampling"] = {**asdict(experiment.sampling), "steps": steps}
        for name, picture in pictures.items():
            files.write_bytes(files.join(stage.folder, name), png(picture))
            stage.run.picture(picture, name)
        stage.run.metrics(figures, 0)
        files.write_json(report_url, report | identity)
        return report | identity


def read_report(experiment: Experiment) -> dict[str, Any]:
    """The report of the pair, or of the autoencoder, that is in the experiment's folder now.

    Raises:
        FileNotFoundError: not evaluated yet.
        ValueError: the report is about other weights.
    """
    url = files.join(experiment.folder, "evaluation/report.json")
    if not files.exists(url):
        raise FileNotFoundError(f"{url!r} is missing: run evaluate.py first")
    report = files.read_json(url)
    for part, place in (("autoencoder_hash", AUTOENCODER), ("prior_hash", PRIOR)):
        if files.exists(files.join(experiment.folder, place, CONFIG)):
            trained = read_model_config(files.join(experiment.folder, place))["hash"]
            if report.get(part) != trained:
                raise ValueError(
                    f"{url!r} has {part} {str(report.get(part))[:12]}, but the trained one is {trained[:12]}: run "
                    "evaluate.py again"
                )
    return report


def _protocol(fingerprint: dict[str, Any]) -> str:
    """A hash of what is measured, how and on which images: figures of one protocol may be compared."""
    images = ("shards", "data.image_size", "data.channels", "data.fit", "vgg_sha256")
    decides = {name: value for name, value in fingerprint.items() if name in images or name.startswith("evaluation.")}
    decides.pop("evaluation.batch_size")  # of the work, not of what is measured
    return files.sha256(json.dumps(decides, sort_keys=True).encode())


def _prior_figures(experiment: Experiment, classes: int, measured: Measured, samples: Tensor) -> dict[str, float]:
    bound, sampled = measured.bounds
    figures = {"bound": bound.bits_per_bit, "bound_se": bound.standard_error}
    figures |= {"bound_sampling": sampled.bits_per_bit, "bound_sampling_se": sampled.standard_error}
    if experiment.evaluation.class_accuracy and classes:
        labels = sample_labels(0, len(samples), classes)
        assert labels is not None, "there are classes"
        figures |= _class_accuracy(experiment, samples, labels)
    return figures


def _check(experiment: Experiment) -> None:
    """Find the images, and the weights of the extractors that were asked for, before anything is started."""
    config, loss = experiment.evaluation, experiment.loss
    check_shards(experiment.data, "validation")
    if config.lpips:
        VGG16.find(loss.vgg_weights, loss.vgg_sha256)
    if config.frechet:
        INCEPTION.find(config.inception_weights, config.inception_sha256)


def _measure(experiment: Experiment, prior: dict[str, Any] | None) -> Measured:
    pieces: list[Reconstruct | Draw | Judge] = []
    if prior is not None:
        total, batch = experiment.evaluation.samples, experiment.evaluation.batch_size
        pieces += [Judge(None), Judge(experiment.sampling)]
        for start in range(0, total, batch):
            count = min(batch, total - start)
            labels = sample_labels(start, count, prior["prior"]["classes"])
            pieces.append(Draw(experiment.sampling, labels, count, start, experiment.seed))
    pieces += [Reconstruct(url) for url in check_shards(experiment.data, "validation")]
    found = Measured()
    for result in map_on_actors(Evaluator, (experiment,), "work", pieces, experiment.cluster, "evaluate"):
        match result:
            case Reconstructions():
                found.remade.merge(result)
            case Bound():
                found.bounds.append(result)
            case _:
                found.samples.append(result)
    found.remade.skipped.check(experiment.data.max_skipped)
    return found


def _class_accuracy(experiment: Experiment, samples: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """How often a logistic regression on real pixels sees the class asked for; and how good it is itself."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    data = experiment.data

    def table(pattern: str) -> tuple[Any, list[int]]:
        images = first_images(pattern, data, _CLASSIFIER_IMAGES)
        return stack(images).flatten(1).numpy() / 255.0, [image.label for image in images]

    with threadpool_limits(1):  # its products are small: where a core is busy, threads only wait for each other
        classifier = LogisticRegression(max_iter=1000).fit(*table(data.train))
        return {
            "class_accuracy": float(classifier.score(samples.flatten(1).numpy() / 255.0, labels)),
            "classifier_accuracy": float(classifier.score(*table(data.validation))),
        }


def _reconstructions(experiment: Experiment) -> dict[str, Any]:
    pixels = stack(first_images(experiment.data.validation, experiment.data, _PICTURE_IMAGES))
    return {"reconstructions.png": reconstruction_grid(pixels, bld_core.load(experiment.folder).reconstruct(pixels))}


def table(report: dict[str, Any]) -> str:
    """The report's figures as lines of text."""
    figures = report["figures"]
    lines = [
        f"reconstruction PSNR     {figures['psnr']:7.2f} dB  (held-out images, sd {figures['psnr_std']:.2f})",
        f"reconstruction SSIM     {figures['ssim']:7.3f}     (sd {figures['ssim_std']:.3f})",
    ]
    if "dead_bits" in figures:
        lines.append(
            f"dead bits               {figures['dead_bits']:7.1%}     entropy {figures['bit_entropy']:.3f} bits a bit, "
            f"correlation {figures['bit_correlation']:.3f}"
        )
    if "bound" in figures:
        lines.append(
            f"likelihood bound        {figures['bound']:7.4f}     bits a bit "
            f"(held-out codes, se {figures['bound_se']:.4f})"
        )
        lines.append(
            f"... of steps sampled    {figures['bound_sampling']:7.4f}     bits a bit "
            f"({report['sampling']['steps']} steps, se {figures['bound_sampling_se']:.4f})"
        )
    if "lpips" in figures:
        lines.append(f"reconstruction LPIPS    {figures['lpips']:7.4f}     (VGG16, sd {figures['lpips_std']:.4f})")
    lines += [f"{name:<23} {value:7.2f}     of reconstructions" for name, value in figures.items() if name[:2] == "rf"]
    if "class_accuracy" in figures:
        lines += [
            f"samples of their class  {figures['class_accuracy']:7.1%}     of {report['samples']}, "
            f"{report['sampling']['steps']} steps, by logistic regression on pixels",
            f"... which on held-out   {figures['classifier_accuracy']:7.1%}     real images is right",
        ]
    return "\n".join(lines)
