"""The two training stages as tasks: what a worker builds, reads, minimises and shows."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import astuple, replace
from typing import NamedTuple

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
from bld_core.data.images import first_images, stack
from bld_core.data.pictures import fitting, grid, reconstruction_grid
from bld_core.data.skipped import Skipped
from bld_core.diffusion.bound import Bound
from bld_core.diffusion.process import CodeBatch
from bld_core.diffusion.sampling import SampleSpec, SamplingConfig
from bld_core.latents.loader import latent_batches
from bld_core.metrics.reconstruction import ReconstructionMetrics
from bld_core.prior.model import make_model
from bld_core.storage import files
from bld_core.trained import load_autoencoder
from bld_core.training.loop import Batch, Objective, TrainingConfig
from cluster.config.artifacts import Codes
from cluster.config.experiment import Experiment
from cluster.data.ingest import Position, image_batches, resume_position
from cluster.plots import bit_usage_plot, profile_plot

_VALIDATION_IMAGES = 256
_VALIDATION_CODES = 512
_PICTURE_IMAGES = 16
_PICTURE_SAMPLES = 40


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

    def choose(self, networks: Sequence[nn.Module], device: torch.device) -> int:
        """Which of several averages of the weights is the best; the first, where the stage has no measure of it."""
        return 0

    @abstractmethod
    def evaluate(self, network: nn.Module, device: torch.device) -> Evaluation:
        """Measure a network on held-out data."""


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
        self._held_out: Tensor | None = None
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

    def evaluate(self, network: nn.Module, device: torch.device) -> Evaluation:
        assert isinstance(network, Autoencoder), "stage 1 trains an autoencoder"
        if self._held_out is None:
            data = self.experiment.data
            self._held_out = stack(first_images(data.validation, data, _VALIDATION_IMAGES))
        found, outputs = ReconstructionMetrics(), list[Tensor]()
        for images in self._held_out.split(self.experiment.latents.batch_size):
            outputs.append(found.update(network, images.to(device), self._lpips).cpu())
        found_metrics = found.metrics(self.experiment.loss.vgg_sha256)
        metrics = {name: value for name, value in found_metrics.items() if not name.endswith("_std")}
        if isinstance(network.bottleneck, VectorBottleneck):
            metrics["perplexity"] = float(network.bottleneck.perplexity)
        count = fitting(self.experiment.data.image_size, _PICTURE_IMAGES, 3)
        pictures = {"reconstructions": reconstruction_grid(self._held_out[:count], torch.cat(outputs)[:count])}
        if found.health.count:
            pictures["bit-usage"] = bit_usage_plot(found.health.usage)
        return Evaluation({f"val_{name}": value for name, value in metrics.items()}, pictures)


class PriorTask(Task):
    """Stage 2."""

    def __init__(self, experiment: Experiment, source: str, codes: Codes) -> None:
        self.experiment = experiment
        self.training = experiment.prior_training
        self.skipped = Skipped()
        self.source, self.codes = source, codes
        h, w, c = experiment.code_shape
        self.model = make_model(experiment.prior, experiment.diffusion, h * w, c)
        self._held_out: CodeBatch | None = None

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

    def _bound(self, network: nn.Module, device: torch.device, sampling: SamplingConfig | None = None) -> Bound:
        if self._held_out is None:
            held_out = self.codes.held_out.read()
            self._held_out = CodeBatch.numbered(*held_out.part(slice(_VALIDATION_CODES), device))
        return self.model.bound(network, self._held_out, self.experiment.seed, sampling)

    def choose(self, networks: Sequence[nn.Module], device: torch.device) -> int:
        bounds = [self._bound(network, device).bits_per_bit for network in networks]
        return bounds.index(min(bounds))

    def evaluate(self, network: nn.Module, device: torch.device) -> Evaluation:
        experiment, model, seed = self.experiment, self.model, self.experiment.seed
        bound, sampled = (self._bound(network, device, sampling) for sampling in (None, experiment.sampling))
        index = torch.arange(_PICTURE_SAMPLES, device=device)
        labels = index % experiment.prior.classes if experiment.prior.classes else None
        z = model.sample(network, SampleSpec(index, labels, seed), experiment.sampling)
        images = load_autoencoder(self.source, str(device)).decode(z.view(-1, *experiment.code_shape)).cpu()
        metrics = {"val_bound": bound.bits_per_bit, "val_bound_se": bound.standard_error}
        metrics["val_bound_sampling"] = sampled.bits_per_bit
        pictures = {"samples": grid(images, 10), "bound-profile": profile_plot(bound.profile)}
        return Evaluation(metrics, pictures, bound.per_code)
