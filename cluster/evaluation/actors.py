"""The actor of the evaluation job: it draws, decodes, and takes features; images leave it only where they are shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bld_core.autoencoder.perceptual import load_perceptual, lpips_name
from bld_core.autoencoder.quantizer import BernoulliBottleneck, CodeHealth
from bld_core.data.images import read_images, stack, to_float, to_uint8
from bld_core.data.pictures import picture, png
from bld_core.data.shards import Sample, write_shard
from bld_core.data.skipped import Skipped
from bld_core.diffusion.bound import Bound
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.reconstruction import Moments, ReconstructionQuality
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.evaluation.extractors import Inception, SpaceName
from cluster.evaluation.references import Space, load_extractor
from cluster.sampling.sampler import Draw, Judge, Sampler

CALLS = 2
"""Pieces that an actor is to work on at the same time."""


@dataclass(frozen=True)
class Reconstruct:
    """Piece of work: reconstruct the images of one validation shard."""

    url: str


@dataclass(frozen=True)
class Look:
    """Piece of work: draw samples and take their features.

    Attributes:
        draw: which.
        pixels: hand back the images, too.
        folder: where each image is written as PNG; empty writes none.
        shard: where all of them are written as a shard, with their classes; empty writes none.
    """

    draw: Draw
    pixels: bool = False
    folder: str = ""
    shard: str = ""


class Drawn(NamedTuple):
    """Drawn images: what comes back is smaller than sums would be, (F, F), until a piece of work has F images.

    Attributes:
        seed: that they were drawn with.
        first_index: of the first of them.
        features: by space, float32 (B, F), on the CPU.
        logits: of the Inception score, float32 (B, 1008), where it is asked for.
        images: uint8 (B, H, W, channels), where they are asked for.
        seconds: of drawing, decoding included.
    """

    seed: int
    first_index: int
    features: dict[SpaceName, Tensor]
    logits: Tensor | None
    images: Tensor | None
    seconds: float


@dataclass
class Reconstructions:
    """What held-out images look like through their codes, from sums that merge; features by space."""

    quality: ReconstructionQuality = field(default_factory=ReconstructionQuality)
    lpips: Moments = field(default_factory=Moments)
    health: CodeHealth = field(default_factory=CodeHealth)
    real: dict[Space, FeatureMoments] = field(default_factory=dict)
    remade: dict[Space, FeatureMoments] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)

    def merge(self, other: Reconstructions) -> None:
        """Add another piece of work."""
        self.quality.merge(other.quality)
        self.lpips.merge(other.lpips)
        self.health.merge(other.health)
        self.skipped.merge(other.skipped)
        for ours, more in ((self.real, other.real), (self.remade, other.remade)):
            for space, moments in more.items():
                ours.setdefault(space, FeatureMoments()).merge(moments)

    def figures(self, vgg_sha256: str) -> dict[str, float]:
        """The figures by name; those that were measured. LPIPS is by the weights of VGG16 of that hash."""
        found = {
            "psnr": self.quality.psnr.mean,
            "psnr_std": self.quality.psnr.deviation,
            "ssim": self.quality.ssim.mean,
            "ssim_std": self.quality.ssim.deviation,
        }
        if self.health.count:  # there are bits
            found |= self.health.figures()
        if self.lpips.count:
            name = lpips_name(vgg_sha256)
            found |= {name: self.lpips.mean, f"{name}_std": self.lpips.deviation}
        for space, moments in self.real.items():
            found[space.figure("rfd")] = frechet_distance(moments, self.remade[space])
        if self.skipped.total:
            found["skipped_images"] = self.skipped.total
        return found


class Evaluator(Sampler):
    """An actor that judges reconstructions and, where there is a prior, draws samples and judges its bound.

    Args:
        experiment: finished; stage 1 alone, too.
        spaces: whose extractors look at images.
    """

    def __init__(self, experiment: Experiment, spaces: Sequence[Space]) -> None:
        super().__init__(experiment)
        self.perceptual = (
            load_perceptual(experiment.loss, self.generator.device) if experiment.evaluation.lpips else None
        )
        self.extractors = {space: load_extractor(experiment, space) for space in spaces}
        self._prior, self._eyes = (
            ThreadPoolExecutor(1, initializer=experiment.cluster.limit_threads) for _ in range(2)
        )

    def work(self, piece: Reconstruct | Look | Judge) -> Reconstructions | Drawn | Bound:
        """Do one piece: sums over reconstructions, drawn images, or the bound.

        What draws or judges has a thread of its own, and so has what looks at images: of two pieces in work at the same
        time, one is drawn while the other is looked at.
        """
        match piece:
            case Reconstruct(url):
                return self._eyes.submit(self._reconstruct, url).result()
            case Look():
                images, seconds = self._prior.submit(self._draw_timed, piece.draw).result()
                return self._eyes.submit(self._look, piece, images, seconds).result()
            case Judge():
                return self._prior.submit(self.judge, piece).result()

    def _draw_timed(self, draw: Draw) -> tuple[Tensor, float]:
        began = time.perf_counter()
        images = self.draw(draw)
        return images, time.perf_counter() - began

    def _look(self, piece: Look, images: Tensor, seconds: float) -> Drawn:
        features: dict[SpaceName, Tensor] = {}
        logits: Tensor | None = None
        for space, extractor in self.extractors.items():
            found = extractor(images)
            if isinstance(extractor, Inception) and self.experiment.evaluation.inception_score:
                logits = extractor.logits(found).cpu()
            features[space.name] = found.cpu()
        if piece.folder or piece.shard:
            self._write(piece, images)
        return Drawn(
            piece.draw.seed, piece.draw.first_index, features, logits, images if piece.pixels else None, seconds
        )

    def _write(self, piece: Look, images: Tensor) -> None:
        draw = piece.draw
        labels = draw.labels or [-1] * draw.count
        samples = [
            Sample(f"{number:06d}", "png", png(picture(image)), label)
            for number, (image, label) in enumerate(zip(images, labels, strict=True), draw.first_index)
        ]
        if piece.folder:
            for sample in samples:
                files.write_bytes(files.join(piece.folder, f"{sample.key}.png"), bytes(sample.data))
        if piece.shard:
            write_shard(piece.shard, samples)

    @torch.no_grad()
    def _reconstruct(self, url: str) -> Reconstructions:
        found, autoencoder = Reconstructions(), self.generator.autoencoder.network
        images = list(read_images(url, self.experiment.data, found.skipped))
        if not images:
            return found
        spaces = [space for space in self.extractors if space.has_moments]
        found.real |= {space: FeatureMoments() for space in spaces}
        found.remade |= {space: FeatureMoments() for space in spaces}
        for batch in stack(images).split(self.experiment.latents.batch_size):
            x = to_float(batch.to(self.generator.device))
            features = autoencoder.encode(x)
            remade = to_uint8(autoencoder.decode(autoencoder.bottleneck(features)[0]))
            found.quality.update(batch, remade.cpu())
            if isinstance(autoencoder.bottleneck, BernoulliBottleneck):
                found.health.update(features)
            if self.perceptual is not None:
                found.lpips.update(self.perceptual(x, to_float(remade)))
            for space in spaces:
                found.real[space].update(self.extractors[space](batch))
                found.remade[space].update(self.extractors[space](remade))
        return found
