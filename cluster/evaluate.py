"""Evaluation of a finished experiment on a pool of actors; the driver merges their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import bld_core
from bld_core import files
from bld_core.autoencoder import to_float, to_uint8
from bld_core.checkpoint import read_model_config
from bld_core.diffusion import Bound, DiffusionConfig, likelihood_bound
from bld_core.generator import AUTOENCODER, PRIOR
from bld_core.images import check_shards, first_images, read_images, stack
from bld_core.latents import open_latents
from bld_core.losses import VGG16, load_perceptual
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.reconstruction import Moments, ReconstructionQuality
from bld_core.pictures import grid, png, reconstruction_grid
from bld_core.quantizer import CodeHealth, quantize
from bld_core.skipped import Skipped
from cluster.experiment import EvaluationConfig, Experiment
from cluster.features import INCEPTION, Inception, frechet_name
from cluster.runtime import map_on_actors
from cluster.sample import Draw, Sampler
from cluster.stages import open_stage

_PICTURE_IMAGES = 32
_PICTURE_SAMPLES = 80
_CLASSIFIER_IMAGES = 5000


@dataclass(frozen=True)
class Reconstruct:
    """Piece of work: reconstruct the images of one validation shard."""

    url: str


@dataclass(frozen=True)
class Judge:
    """Piece of work: the likelihood bound of the held-out codes."""


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
            **self.health.figures(),
        }
        if config.lpips:
            found |= {"lpips": self.lpips.mean, "lpips_std": self.lpips.deviation}
        if config.frechet:
            found[frechet_name("r", config.inception_sha256)] = frechet_distance(self.real, self.remade)
        if self.skipped.total:
            found["skipped_images"] = self.skipped.total
        return found


class Evaluator(Sampler):
    """An actor that draws samples, and judges reconstructions and the bound."""

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
                return self._judge()

    @torch.no_grad()
    def _reconstruct(self, url: str) -> Reconstructions:
        found, autoencoder = Reconstructions(), self.generator.autoencoder.network
        images = list(read_images(url, self.experiment.data, found.skipped))
        if not images:
            return found
        for batch in stack(images).split(self.experiment.latents.batch_size):
            x = to_float(batch.to(self.generator.device))
            logits = autoencoder.encode(x)
            remade = to_uint8(autoencoder.decode(quantize(logits)))
            found.quality.update(batch, remade.cpu())
            found.health.update(logits)
            if self.perceptual is not None:
                found.lpips.update(self.perceptual(x, to_float(remade)))
            if self.inception is not None:
                found.real.update(self.inception(batch))
                found.remade.update(self.inception(remade))
        return found

    def _judge(self) -> Bound:
        prior = self.generator.prior
        assert prior is not None, "evaluation starts from a finished prior"
        held_out = open_latents(files.join(self.experiment.folder, "latents"), "validation")
        device = self.generator.device
        held_out = held_out.to(device)
        codes = held_out.codes(torch.arange(len(held_out), device=device))
        diffusion = DiffusionConfig(**prior.config["diffusion"])
        return likelihood_bound(
            prior.network,
            codes,
            held_out.labels,
            diffusion.make_schedule(),
            target=diffusion.target,
            seed=self.experiment.seed,
        )


def sample_labels(start: int, count: int, classes: int) -> list[int] | None:
    """Balanced classes: sample i is of class i mod classes; None without classes."""
    return [i % classes for i in range(start, start + count)] if classes else None


def evaluate(experiment: Experiment, fresh: bool = False) -> dict[str, Any]:
    """Finished experiment -> <folder>/evaluation: report.json and pictures.

    Args:
        experiment: its configuration.
        fresh: evaluate again even if the same report is there.

    Returns:
        The report: figures by name.

    Raises:
        FileNotFoundError: a stage is not finished.
    """
    autoencoder = read_model_config(files.join(experiment.folder, AUTOENCODER))
    prior = read_model_config(files.join(experiment.folder, PRIOR))
    experiment.check_autoencoder(autoencoder)
    _check(experiment)
    identity = {"autoencoder_hash": autoencoder["hash"], "prior_hash": prior["hash"], "prior_run": prior["run"]}
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
        classes = prior["prior"]["classes"]
        remade, bound, samples = _measure(experiment, classes)
        figures = remade.figures(experiment.evaluation)
        figures |= {"bound": bound.bits_per_bit, "bound_se": bound.standard_error}
        if experiment.evaluation.class_accuracy and classes:
            labels = sample_labels(0, len(samples), classes)
            assert labels is not None, "there are classes"
            figures |= _class_accuracy(experiment, samples, labels)
        pictures = {"samples.png": grid(samples[:_PICTURE_SAMPLES], classes or 10), **_reconstructions(experiment)}
        for name, picture in pictures.items():
            files.write_bytes(files.join(stage.folder, name), png(picture))
            stage.run.picture(picture, name)
        stage.run.metrics(figures, 0)
        report = {"figures": figures, "samples": len(samples), "sampling": asdict(experiment.sampling), **identity}
        files.write_json(report_url, report)
        return report


def _check(experiment: Experiment) -> None:
    """Find the images, and the weights of the extractors that were asked for, before anything is started."""
    config, loss = experiment.evaluation, experiment.loss
    check_shards(experiment.data, "validation")
    if config.lpips:
        VGG16.find(loss.vgg_weights, loss.vgg_sha256)
    if config.frechet:
        INCEPTION.find(config.inception_weights, config.inception_sha256)


def _measure(experiment: Experiment, classes: int) -> tuple[Reconstructions, Bound, Tensor]:
    total, batch = experiment.evaluation.samples, experiment.evaluation.batch_size
    pieces: list[Reconstruct | Draw | Judge] = [Judge()]
    for start in range(0, total, batch):
        count = min(batch, total - start)
        pieces.append(Draw(sample_labels(start, count, classes), count, start, experiment.seed))
    pieces += [Reconstruct(url) for url in check_shards(experiment.data, "validation")]
    remade, bound, samples = Reconstructions(), None, []
    for result in map_on_actors(Evaluator, (experiment,), "work", pieces, experiment.cluster, "evaluate"):
        match result:
            case Reconstructions():
                remade.merge(result)
            case Bound():
                bound = result
            case _:
                samples.append(result)
    assert bound is not None, "one of the pieces is the bound"
    remade.skipped.check(experiment.data.max_skipped)
    return remade, bound, torch.cat(samples)


def _class_accuracy(experiment: Experiment, samples: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """How often a logistic regression on real pixels sees the class asked for; and how good it is itself."""
    from sklearn.linear_model import LogisticRegression

    data = experiment.data

    def table(pattern: str) -> tuple[Any, list[int]]:
        images = first_images(pattern, data, _CLASSIFIER_IMAGES)
        return stack(images).flatten(1).numpy() / 255.0, [image.label for image in images]

    classifier = LogisticRegression(max_iter=1000).fit(*table(data.train))
    return {
        "class_accuracy": float(classifier.score(samples.flatten(1).numpy() / 255.0, labels)),
        "classifier_accuracy": float(classifier.score(*table(data.validation))),
    }


def _reconstructions(experiment: Experiment) -> dict[str, Any]:
    pixels = stack(first_images(experiment.data.validation, experiment.data, _PICTURE_IMAGES))
    generator = bld_core.load(experiment.folder)
    return {"reconstructions.png": reconstruction_grid(pixels, generator.decode(generator.encode(pixels)))}


def table(report: dict[str, Any]) -> str:
    """The report's figures as lines of text."""
    figures = report["figures"]
    lines = [
        f"reconstruction PSNR     {figures['psnr']:7.2f} dB  (held-out images, sd {figures['psnr_std']:.2f})",
        f"reconstruction SSIM     {figures['ssim']:7.3f}     (sd {figures['ssim_std']:.3f})",
        f"dead bits               {figures['dead_bits']:7.1%}     entropy {figures['bit_entropy']:.3f} bits a bit, "
        f"correlation {figures['bit_correlation']:.3f}",
        f"likelihood bound        {figures['bound']:7.4f}     bits a bit "
        f"(held-out codes, se {figures['bound_se']:.4f})",
    ]
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
