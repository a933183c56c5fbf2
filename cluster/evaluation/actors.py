"""The actor of evaluations and studies: it draws, decodes, and takes features; images leave it only to be shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bld_core.autoencoder.perceptual import load_lpips
from bld_core.data.pictures import picture, png
from bld_core.data.shards import Sample, write_shard
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack
from bld_core.diffusion.bound import Bound
from bld_core.latents.reader import Latents
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.reconstruction import ReconstructionMetrics
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.data.decoding import ShardDecoder
from cluster.evaluation.extractors import Inception, SpaceName
from cluster.evaluation.references import Space, load_extractor
from cluster.sampling.sampler import Draw, MeasureBound, Sampler

CALLS = 2
"""Pieces that an actor is to work on at the same time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reconstruct:
    """Piece of work: reconstruct the images of one validation shard, and hand back the first of them as `shown`."""

    url: str
    shown: int = 0


@dataclass(frozen=True)
class SampleFeatures:
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
    """What was measured of held-out images and their reconstructions, from sums that merge.

    Attributes:
        sums: PSNR, SSIM, LPIPS, health of the bits.
        real: moments of the features of the images, by space.
        reconstructed: the same of the reconstructions.
        skipped: what was left out.
        shown: the first images and their reconstructions, uint8 (n, H, W, channels) each.
    """

    sums: ReconstructionMetrics = field(default_factory=ReconstructionMetrics)
    real: dict[Space, FeatureMoments] = field(default_factory=dict)
    reconstructed: dict[Space, FeatureMoments] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)
    shown: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def merge(self, other: Reconstructions) -> None:
        """Add the next piece of work."""
        self.sums.merge(other.sums)
        self.skipped.merge(other.skipped)
        self.shown += other.shown
        for ours, more in ((self.real, other.real), (self.reconstructed, other.reconstructed)):
            for space, moments in more.items():
                ours.setdefault(space, FeatureMoments()).merge(moments)

    def metrics(self, vgg_sha256: str) -> dict[str, float]:
        """The metrics by name; those that were measured. LPIPS is by the weights of VGG16 of that hash."""
        found = self.sums.metrics(vgg_sha256)
        for space, moments in self.real.items():
            found[space.metric_name("rfd")] = frechet_distance(moments, self.reconstructed[space])
        if self.skipped.total:
            found["skipped_images"] = self.skipped.total
        return found

    def pictures(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` images and their reconstructions."""
        images, reconstructed = (torch.cat(parts)[:count] for parts in zip(*self.shown, strict=True))
        return images, reconstructed


class Evaluator(Sampler):
    """An actor that measures reconstructions and, where there is a prior, samples and the bound.

    Args:
        experiment: finished; stage 1 alone, too.
        spaces: in whose features images are compared.
        held_out: the validation part of the latents, where there is a prior.
        reference: whose references they are compared with; by default the experiment's own.
    """

    def __init__(
        self,
        experiment: Experiment,
        spaces: Sequence[Space],
        held_out: Latents | None = None,
        reference: Experiment | None = None,
    ) -> None:
        super().__init__(experiment, held_out)
        self.perceptual = load_lpips(experiment.loss, self.generator.device) if experiment.evaluation.lpips else None
        self.extractors = {space: load_extractor(reference or experiment, space) for space in spaces}
        self.decoder = ShardDecoder(experiment)
        several = not experiment.cluster.in_process  # pieces at the same time
        self._for_prior, self._for_features = (
            ThreadPoolExecutor(1, initializer=experiment.cluster.limit_threads) if several else None for _ in range(2)
        )

    def work(self, piece: Reconstruct | SampleFeatures | MeasureBound) -> Reconstructions | Drawn | Bound:
        """Do one piece: sums over reconstructions, drawn images and their features, or the bound.

        What the prior does has a thread of its own, and so has what takes features: of two pieces in work at the same
        time, one is drawn while features are taken of the other.
        """
        match piece:
            case Reconstruct():
                return _within(self._for_features, self._reconstruct, piece)
            case SampleFeatures():
                images, seconds = _within(self._for_prior, self._draw_timed, piece.draw)
                return _within(self._for_features, self._take_features, piece, images, seconds)
            case MeasureBound():
                return _within(self._for_prior, self.bound, piece)

    def _draw_timed(self, draw: Draw) -> tuple[Tensor, float]:
        began = time.perf_counter()
        images = self.draw(draw)
        return images, time.perf_counter() - began

    def _take_features(self, piece: SampleFeatures, images: Tensor, seconds: float) -> Drawn:
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

    def _write(self, piece: SampleFeatures, images: Tensor) -> None:
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

    def _reconstruct(self, piece: Reconstruct) -> Reconstructions:
        found, network = Reconstructions(), self.generator.autoencoder.network
        spaces = [space for space in self.extractors if space.has_moments]
        missing = piece.shown
        for batch in self.decoder.batches(piece.url, found.skipped):
            images = stack(batch)
            reconstructed = found.sums.update(network, images, self.perceptual)
            for space in spaces:
                found.real.setdefault(space, FeatureMoments()).update(self.extractors[space](images))
                found.reconstructed.setdefault(space, FeatureMoments()).update(self.extractors[space](reconstructed))
            if missing > 0:
                found.shown.append((images[:missing], reconstructed[:missing].cpu()))
                missing -= len(images)
        return found


def _within(thread: ThreadPoolExecutor | None, function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a thread, and wait for it; or here, where there is none: a stop then ends it at once."""
    return function(*arguments) if thread is None else thread.submit(function, *arguments).result()
