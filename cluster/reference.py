"""What samples are compared with: real images, as moments in the features of a classifier, or of Inception."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from bld_core import files
from bld_core.checkpoint import load_weights, read_model_config, save_model
from bld_core.diffusion import Bound
from bld_core.generator import AUTOENCODER, Generator, load_prior
from bld_core.images import ImageConfig, check_shards, first_images, read_images, stack
from bld_core.metrics.classifier import Classifier, accuracy, train_classifier
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.skipped import Skipped
from cluster.experiment import Experiment
from cluster.features import INCEPTION, Inception, frechet_name
from cluster.runtime import map_on_actors
from cluster.sample import Draw, Judge, Sampler
from cluster.stages import open_stage

_STAGE = "study/reference"
_RESULT = "reference.json"
_MOMENTS = "moments.safetensors"
_CLASSIFIER_BYTES = 1 << 30  # of pixels that a classifier learns from

Extractor = Callable[[Tensor], Tensor]
"""uint8 images (B, H, W, channels) -> features (B, F)."""


@dataclass(frozen=True)
class Look:
    """Piece of work: the features of the images of one shard, and of their reconstructions where they are held out."""

    url: str
    held_out: bool


@dataclass(frozen=True)
class Examine:
    """Piece of work: draw from the prior of an experiment's folder, or judge it."""

    folder: str
    work: Draw | Judge


class Drawn(NamedTuple):
    """Moments of drawn images, and the seconds that it took to draw them, decoding included."""

    moments: FeatureMoments
    seconds: float


class Seen(NamedTuple):
    """Moments of the images of a shard, and of their reconstructions, of which there may be none."""

    real: FeatureMoments
    remade: FeatureMoments


class ClassifierTrainer:
    """An actor that trains the classifier."""

    def __init__(self, experiment: Experiment) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment

    def train(self, folder: str) -> float:
        """Train on real images and save into `folder`; returns the accuracy on held-out ones."""
        data, device = self.experiment.data, torch.device(self.experiment.cluster.device)
        images, labels = _labelled(data.train, data)
        classes = int(labels.max()) + 1
        steps, seed = self.experiment.study.classifier_steps, self.experiment.seed
        network = train_classifier(images.to(device), labels.to(device), classes, steps, seed)
        held_out, truth = _labelled(data.validation, data)
        right = accuracy(network, held_out.to(device), truth.to(device))
        config = {"image_size": data.image_size, "channels": data.channels, "classes": classes, "accuracy": right}
        save_model(folder, network.state_dict(), config)
        return right


def _labelled(pattern: str, data: ImageConfig) -> tuple[Tensor, Tensor]:
    limit = _CLASSIFIER_BYTES // (data.image_size**2 * data.channels)
    images = first_images(pattern, data, limit)
    return stack(images), torch.tensor([image.label for image in images])


def _load_extractor(experiment: Experiment) -> Extractor:
    config, device = experiment.evaluation, torch.device(experiment.cluster.device)
    if config.frechet:
        return Inception(config.inception_weights, config.inception_sha256, device)
    folder = files.join(experiment.folder, _STAGE, "classifier")
    found = read_model_config(folder)
    classifier = Classifier(found["image_size"], found["channels"], found["classes"])
    load_weights(folder, classifier, found["hash"], str(device))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return classifier.features(images.to(device))

    return features


class Examiner(Sampler):
    """An actor that looks at real and at drawn images through the extractor; images never leave it."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.extractor = _load_extractor(experiment)
        self.folder = experiment.folder

    def work(self, piece: Look | Examine) -> Seen | Drawn | Bound:
        """Do one piece."""
        if isinstance(piece, Look):
            return self._look(piece)
        if piece.folder != self.folder:
            autoencoder, device = self.generator.autoencoder, str(self.generator.device)
            self.generator = Generator(autoencoder, load_prior(piece.folder, autoencoder, device), device)
            self.folder = piece.folder
        if isinstance(piece.work, Judge):
            return self.judge(piece.work)
        began, moments = time.perf_counter(), FeatureMoments()
        images = self.draw(piece.work)
        seconds = time.perf_counter() - began
        moments.update(self.extractor(images))
        return Drawn(moments, seconds)

    def _look(self, piece: Look) -> Seen:
        data, seen = self.experiment.data, Seen(FeatureMoments(), FeatureMoments())
        for images in stack(list(read_images(piece.url, data, Skipped()))).split(self.experiment.latents.batch_size):
            seen.real.update(self.extractor(images))
            if piece.held_out:
                seen.remade.update(self.extractor(self.generator.decode(self.generator.encode(images))))
        return seen


@dataclass(frozen=True)
class Reference:
    """Real images in the features of an extractor.

    Attributes:
        name: what a Frechet distance to them is called: fd_classifier, or fid with the true Inception weights.
        hash: of the moments, which identifies extractor and images.
        moments: of the training images.
        figures: the distance of held-out images and of their reconstructions, which no sample is expected to beat; and
            the accuracy of the classifier on held-out images, where there is one.
    """

    name: str
    hash: str
    moments: FeatureMoments
    figures: dict[str, float]


def make_reference(experiment: Experiment) -> Reference:
    """Finished autoencoder, image shards -> <folder>/study/reference, made once.

    The extractor is Inception where `evaluation.frechet` is set, or else a classifier that is trained here.

    Raises:
        FileNotFoundError: no autoencoder yet, or no weights of Inception.
        ValueError: images without classes, and no Inception.
    """
    config, data = experiment.evaluation, experiment.data
    autoencoder = read_model_config(files.join(experiment.folder, AUTOENCODER))
    experiment.check_autoencoder(autoencoder)
    looks = [Look(url, split == "validation") for split in ("train", "validation") for url in check_shards(data, split)]
    if config.frechet:
        INCEPTION.find(config.inception_weights, config.inception_sha256)
    elif first_images(data.train, data, 1)[0].label < 0:
        raise ValueError(
            "evaluation.frechet is false, so a study compares images by a classifier, but the training shards hold no "
            "classes: set evaluation.frechet to compare them by Inception"
        )
    fingerprint = {
        "autoencoder_hash": autoencoder["hash"],
        **experiment.fingerprint("data"),
        "shards": files.fingerprint([look.url for look in looks]),
        "extractor": config.inception_sha256 if config.frechet else f"classifier {experiment.study.classifier_steps}",
    }
    with open_stage(experiment, _STAGE, fingerprint, _RESULT, on_change="redo") as stage:
        if not stage.done:
            name = frechet_name("", config.inception_sha256) if config.frechet else "fd_classifier"
            figures: dict[str, float] = {}
            if not config.frechet:
                folder = files.join(stage.folder, "classifier")
                work = map_on_actors(
                    ClassifierTrainer, (experiment,), "train", [folder], experiment.cluster, "classifier"
                )
                [figures["classifier_accuracy"]] = work
            train, held_out, remade = FeatureMoments(), FeatureMoments(), FeatureMoments()
            work = map_on_actors(Examiner, (experiment,), "work", looks, experiment.cluster, "real images")
            for look, seen in zip(looks, work, strict=True):
                (held_out if look.held_out else train).merge(seen.real)
                remade.merge(seen.remade)
            figures[f"{name}_held_out"] = frechet_distance(train, held_out)
            figures[f"{name}_remade"] = frechet_distance(train, remade)
            stage.run.metrics(figures, 0)
            moments = save_tensors({"mean": train.mean, "scatter": train.scatter})
            files.write_bytes(files.join(stage.folder, _MOMENTS), moments)
            made = {"name": name, "hash": files.sha256(moments), "images": train.count, "figures": figures}
            files.write_json(files.join(stage.folder, _RESULT), made)
        made = files.read_json(files.join(stage.folder, _RESULT))
        tensors = load_tensors(files.read_bytes(files.join(stage.folder, _MOMENTS)))
        moments = FeatureMoments(made["images"], tensors["mean"], tensors["scatter"])
        return Reference(made["name"], made["hash"], moments, made["figures"])
