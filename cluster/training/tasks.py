"""The two training stages as tasks: what a worker builds, reads, minimises and shows."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from dataclasses import astuple, replace
from functools import cache
from itertools import pairwise
from math import ceil
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from PIL.Image import Image
from torch import Tensor, nn

from bld_core.autoencoder.baselines.vector import VectorBottleneck
from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import Autoencoder
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.autoencoder.perceptual import Perceptual, load_perceptual
from bld_core.data.images import first_images
from bld_core.data.pictures import fitting, grid, reconstruction_grid
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack
from bld_core.diffusion.bound import merge_bounds
from bld_core.diffusion.process import CodeBatch
from bld_core.diffusion.sampling import SampleSpec
from bld_core.latents.loader import latent_batches
from bld_core.metrics.reconstruction import ReconstructionMetrics
from bld_core.prior.model import make_model
from bld_core.storage import files
from bld_core.trained import load_autoencoder
from bld_core.training.loop import Batch, Objective, TrainingConfig
from cluster.config.artifacts import Codes
from cluster.config.experiment import Experiment
from cluster.data.ingest import Position, image_batches, resume_position

_VALIDATION_IMAGES, _IMAGES_A_PIECE = 256, 32
_VALIDATION_CODES, _CODES_A_PIECE = 512, 64
_PICTURE_IMAGES = 16
_PICTURE_SAMPLES, _SAMPLES_A_PIECE = 40, 10

T = TypeVar("T")


class Worker(NamedTuple):
    """A worker among its peers."""

    rank: int
    world: int
    device: torch.device

    def said_by_all(self, message: str) -> str:
        """What all workers say, each thing once, a line each; the same on every one of them."""
        everyone: list[str] = [message] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(everyone, message)
        return "\n".join(dict.fromkeys(said for said in everyone if said))

    def shared(self, work: Callable[[int], T], pieces: int) -> list[T]:
        """Do some of numbered pieces of work, as the other workers do the rest; returns what all have made, in order.

        What becomes of a piece depends on its number alone, so that the number of workers changes nothing.
        """
        mine = [work(piece) for piece in range(self.rank, pieces, self.world)]
        everyone = [mine] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(everyone, mine)
        return [everyone[piece % self.world][piece // self.world] for piece in range(pieces)]


class Evaluation(NamedTuple):
    """What an evaluation in the middle of training has to show: metrics, and pictures by name.

    `per_code` is what each held-out code pays of the bound, in bits a bit.
    """

    metrics: dict[str, float]
    pictures: dict[str, Image]
    per_code: tuple[float, ...] = ()


class Task(ABC):
    """What differs between the stages of training, on one worker.

    Attributes:
        experiment: its configuration.
        training: the part of it that trains this stage.
        skipped: the account of what this worker leaves out of its data.
    """

    experiment: Experiment
    training: TrainingConfig
    skipped: Skipped

    @abstractmethod
    def network(self) -> nn.Module:
        """A freshly initialised network."""

    def critic(self) -> tuple[nn.Module, TrainingConfig] | None:
        """A freshly initialised critic and how it is trained, where the stage has one."""
        return None

    @abstractmethod
    def objective(self, worker: Worker) -> Objective:
        """What is minimised."""

    @abstractmethod
    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        """Batches from `step` on, to be closed; `positions` are those of the checkpoint, one a worker."""

    def position(self) -> list[int]:
        """Where this worker's data stands, for the checkpoint; nothing where the step says it all."""
        return []

    def left_out(self) -> int:
        """Samples that this worker has left out of its data since the first step; `skipped` accounts for new ones."""
        return 0

    def choose(self, networks: Iterable[nn.Module], worker: Worker) -> int:
        """Which of several averages of the weights is the best; the first, where the stage has no measure of it.

        All workers take part, as in `evaluate`. Each network counts until the next is asked for.
        """
        return 0

    @abstractmethod
    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        """Measure a network on held-out data: each worker a part of it. All of them know the metrics, and the first
        has the pictures.
        """


class ImageTask(Task):
    """A stage that learns from images, as they stream from their shards."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.training = experiment.autoencoder_training
        self.skipped = Skipped()
        self._position = Position()

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        shards = len(files.expand(self.experiment.data.train))
        start = resume_position(positions, worker.rank, worker.world, shards)
        stream = image_batches(self.experiment, step, start, worker.rank, worker.world, self.skipped)
        with contextlib.closing(stream):
            for batch, self._position in stream:
                yield batch.to(worker.device)

    def position(self) -> list[int]:
        return [*astuple(self._position)]

    def left_out(self) -> int:
        return self._position.skipped


class AutoencoderTask(ImageTask):
    """Stage 1."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._held_out: tuple[int, dict[int, Tensor]] | None = None
        self._lpips: Perceptual | None = None

    def network(self) -> nn.Module:
        experiment = self.experiment
        return make_autoencoder(experiment.autoencoder, experiment.data.channels, experiment.loss.entropy)

    def critic(self) -> tuple[nn.Module, TrainingConfig] | None:
        loss = self.experiment.loss
        if not loss.adversarial:
            return None
        return (
            PatchCritic(loss, self.experiment.data.channels),
            replace(self.training, learning_rate=loss.critic_learning_rate, checkpointing=False),
        )

    def objective(self, worker: Worker) -> Objective:
        experiment = self.experiment
        perceptual = load_perceptual(experiment.loss, worker.device) if experiment.loss.perceptual else None
        self._lpips = perceptual if isinstance(perceptual, Perceptual) else None  # what trains by it measures it
        fade = self.training.steps if experiment.autoencoder.codes == "fade" else 0
        return AutoencoderObjective(experiment.loss, experiment.code_shape, experiment.seed, perceptual, fade=fade)

    def _pieces(self, worker: Worker) -> tuple[int, dict[int, Tensor]]:
        """How many pieces the held-out images are cut into, and those of this worker, by number."""
        if self._held_out is None:
            data = self.experiment.data
            images = first_images(data.validation, data, _VALIDATION_IMAGES)
            count = ceil(len(images) / _IMAGES_A_PIECE)
            mine = range(worker.rank, count, worker.world)
            self._held_out = (
                count,
                {piece: stack(images[piece * _IMAGES_A_PIECE : (piece + 1) * _IMAGES_A_PIECE]) for piece in mine},
            )
        return self._held_out

    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        assert isinstance(network, Autoencoder), "stage 1 trains an autoencoder"
        pieces, mine = self._pieces(worker)
        count = fitting(self.experiment.data.image_size, _PICTURE_IMAGES, 3)
        shown: dict[str, Image] = {}

        def reconstruct(piece: int) -> ReconstructionMetrics:
            found = ReconstructionMetrics()
            outputs = found.update(network, mine[piece].to(worker.device), self._lpips)
            if piece == 0:
                shown["reconstructions"] = reconstruction_grid(mine[piece][:count], outputs[:count].cpu())
            return found

        found = ReconstructionMetrics()
        for part in worker.shared(reconstruct, pieces):
            found.merge(part)
        found_metrics = found.metrics(self.experiment.loss.vgg_sha256)
        metrics = {name: value for name, value in found_metrics.items() if not name.endswith("_std")}
        if isinstance(network.bottleneck, VectorBottleneck):
            metrics["perplexity"] = float(network.bottleneck.perplexity)
        if shown and found.health.count:
            from cluster.plots import bit_usage_plot  # matplotlib takes a second of a core: who draws nothing need not

            shown["bit-usage"] = bit_usage_plot(found.health.usage)
        return Evaluation({f"val_{name}": value for name, value in metrics.items()}, shown)


class PriorTask(Task):
    """Stage 2."""

    def __init__(self, experiment: Experiment, source: str, codes: Codes) -> None:
        self.experiment = experiment
        self.training = experiment.prior_training
        self.skipped = Skipped()
        self.source, self.codes = source, codes
        h, w, c = experiment.code_shape
        self.model = make_model(experiment.prior, experiment.diffusion, h * w, c)
        self._held_out: list[CodeBatch] | None = None

    def network(self) -> nn.Module:
        return self.model.network()

    def objective(self, worker: Worker) -> Objective:
        return self.model.objective(self.experiment.seed)

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        experiment, latents = self.experiment, self.codes.train
        latents_gb, device = experiment.cluster.latents_gb, worker.device
        yield from latent_batches(
            latents, self.training, experiment.seed, step, worker.rank, worker.world, latents_gb, device
        )

    def _pieces(self, device: torch.device) -> list[CodeBatch]:
        """The held-out codes, in pieces of almost the same size."""
        if self._held_out is None:
            held_out = self.codes.held_out.read()
            codes = CodeBatch.numbered(*held_out.part(slice(_VALIDATION_CODES), device))
            count = ceil(len(codes) / _CODES_A_PIECE)
            edges = [len(codes) * number // count for number in range(count + 1)]
            self._held_out = [codes.slice(start, stop) for start, stop in pairwise(edges)]
        return self._held_out

    def choose(self, networks: Iterable[nn.Module], worker: Worker) -> int:
        pieces, seed, bounds = self._pieces(worker.device), self.experiment.seed, list[float]()
        for network in networks:
            parts = worker.shared(lambda piece, of=network: self.model.bound(of, pieces[piece], seed), len(pieces))
            bounds.append(merge_bounds(parts).bits_per_bit)
        return bounds.index(min(bounds))

    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        experiment, model, seed = self.experiment, self.model, self.experiment.seed
        pieces = self._pieces(worker.device)
        grids = None, experiment.sampling
        found = worker.shared(
            lambda piece: [model.bound(network, pieces[piece], seed, grid) for grid in grids], len(pieces)
        )
        bound, sampled = (merge_bounds(parts) for parts in zip(*found, strict=True))
        metrics = {"val_bound": bound.bits_per_bit, "val_bound_se": bound.standard_error}
        metrics["val_bound_sampling"] = sampled.bits_per_bit
        autoencoder = cache(lambda: load_autoencoder(self.source, str(worker.device)))

        def draw(piece: int) -> Tensor:
            index = torch.arange(_SAMPLES_A_PIECE, device=worker.device) + piece * _SAMPLES_A_PIECE
            labels = index % experiment.prior.classes if experiment.prior.classes else None
            z = model.sample(network, SampleSpec(index, labels, seed), experiment.sampling)
            return autoencoder().decode(z.view(-1, *experiment.code_shape)).cpu()

        images = torch.cat(worker.shared(draw, _PICTURE_SAMPLES // _SAMPLES_A_PIECE))
        if worker.rank:
            return Evaluation(metrics, {}, bound.per_code)
        from cluster.plots import profile_plot

        pictures = {"samples": grid(images, 10), "bound-profile": profile_plot(bound.profile)}
        return Evaluation(metrics, pictures, bound.per_code)
