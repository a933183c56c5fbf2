"""What samples are compared with: features of real images by an extractor, taken once for each data set."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from bld_core.data.images import ImageConfig, check_shards, first_images
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack
from bld_core.errors import UserError
from bld_core.metrics.classifier import Classifier, accuracy, train_classifier
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.selection import Selection
from bld_core.precision import ieee_float32
from bld_core.storage import files
from bld_core.storage.records import read_record
from bld_core.storage.weights import DINOV2, EFFICIENTNET_LITE0, INCEPTION, VGG16
from bld_core.training.checkpoint import load_weights, read_model_config, save_model
from cluster.config.experiment import Experiment
from cluster.data.decoding import ShardDecoder
from cluster.evaluation.extractors import (
    DINOv2Features,
    EfficientNetLite0Features,
    Extractor,
    Inception,
    SpaceName,
    VGG16Features,
    metric_name,
)
from cluster.runtime import map_on_actors
from cluster.stages import Stage, open_stage

_STAGE, _SHARED = "reference", "references"
_RESULT = "reference.json"
_MOMENTS = "moments.safetensors"
_FEATURES = "features.safetensors"
_STATISTICS = "statistics.npz"
_CLASSIFIER_BYTES = 1 << 30  # of pixels that a classifier learns from


@dataclass(frozen=True)
class Space:
    """Where sets of images are compared: the features of one extractor.

    Attributes:
        name: of the extractor.
        sha256: of its weights, where they are published ones.
    """

    name: SpaceName
    sha256: str = ""

    @property
    def has_moments(self) -> bool:
        """Whether Frechet distances are taken here; VGG16 is for precision and recall alone."""
        return self.name != "vgg16"

    @property
    def has_kernel_distances(self) -> bool:
        """Whether kernel distances are taken here, where they are asked for."""
        return self.name in ("inception", "efficientnet_lite0")

    def metric_name(self, metric: str) -> str:
        """What a metric is called here; see `metric_name`."""
        return metric_name(metric, self.name, self.sha256)


def spaces_of(experiment: Experiment) -> list[Space]:
    """The spaces that `evaluation` asks for."""
    config = experiment.evaluation
    known = [
        (config.frechet, Space("inception", config.inception_sha256)),
        (bool(config.dinov2_sha256), Space("dinov2", config.dinov2_sha256)),
        (config.efficientnet_lite0, Space("efficientnet_lite0", EFFICIENTNET_LITE0.sha256)),
        (config.vgg16, Space("vgg16", experiment.loss.vgg_sha256)),
        (config.classifier, Space("classifier")),
    ]
    return [space for asked, space in known if asked]


def check_space(experiment: Experiment, space: Space) -> None:
    """Find what an extractor needs before anything is started.

    Raises:
        MissingError: no file of its weights.
        UserError: no package of them, weights of another sha256, or images without classes to train a classifier on.
    """
    config, loss, data = experiment.evaluation, experiment.loss, experiment.data
    if space.name == "inception":
        INCEPTION.find(config.inception_weights, config.inception_sha256)
    elif space.name == "dinov2":
        DINOV2.find(config.dinov2_weights, config.dinov2_sha256)
    elif space.name == "efficientnet_lite0":
        EFFICIENTNET_LITE0.load()
    elif space.name == "vgg16":
        VGG16.find(loss.vgg_weights, loss.vgg_sha256)
    elif first_images(data.train, data, 1)[0].label < 0:
        raise UserError(
            "images are to be compared by a classifier, as evaluation.frechet is false, but the training shards hold "
            "no classes: set evaluation.frechet (Inception) or evaluation.efficientnet_lite0, and "
            "evaluation.classifier to false"
        )


def load_extractor(experiment: Experiment, space: Space) -> Extractor:
    """The extractor of a space on the device of this worker; the classifier is the one that `make_reference` made."""
    config, loss, device = experiment.evaluation, experiment.loss, torch.device(experiment.cluster.device)
    if space.name == "inception":
        return Inception(config.inception_weights, config.inception_sha256, device)
    if space.name == "dinov2":
        return DINOv2Features(config.dinov2_weights, config.dinov2_sha256, device)
    if space.name == "efficientnet_lite0":
        return EfficientNetLite0Features(device)
    if space.name == "vgg16":
        return VGG16Features(loss.vgg_weights, loss.vgg_sha256, device)
    folder = files.join(experiment.folder, _STAGE, space.name, "classifier")
    found = read_model_config(folder)
    classifier = Classifier(found["image_size"], found["channels"], found["classes"])
    load_weights(folder, classifier, found["hash"], str(device))

    @ieee_float32()
    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return classifier.features(images.to(device))

    return features


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


@dataclass(frozen=True)
class TakeFeatures:
    """Piece of work: the features of the images of one shard, of which `most` are to be kept as they are."""

    url: str
    most: int


class ShardFeatures(NamedTuple):
    """What was seen of some images: their moments, some of their features, and what was left out."""

    moments: FeatureMoments
    kept: Selection
    skipped: Skipped


class FeatureActor:
    """An actor that takes the features of real images, of several shards at a time; images never leave it."""

    def __init__(self, experiment: Experiment, space: Space) -> None:
        experiment.cluster.limit_threads()
        self.space = space
        self.extractor = load_extractor(experiment, space)
        self.decoder = ShardDecoder(experiment)
        self.turn = threading.Lock()

    def take(self, piece: TakeFeatures) -> ShardFeatures:
        """Do one piece, a batch of images at a time."""
        seen = ShardFeatures(FeatureMoments(), Selection(piece.most), Skipped())
        for some in self.decoder.batches(piece.url, seen.skipped):
            images = stack(some)
            with self.turn:
                features = self.extractor(images)
            seen.kept.update([image.key for image in some], features)
            if self.space.has_moments:
                seen.moments.update(features)
        return seen


@dataclass(frozen=True)
class Reference:
    """The training images in a space.

    Attributes:
        space: whose features.
        folder: where they lie.
        hash: of the moments or features, which identifies extractor and images.
        moments: of all training images, where the space has them.
        features: float32 (n, F), of as many training images as there will be samples, or of all, evenly chosen; (0,)
            where nothing that is asked for needs them.
        metrics: the Frechet distance of held-out images, which no sample is expected to beat; and the accuracy of the
            classifier on held-out images, where there is one.
        held_out: images behind the distance of held-out images; 0 where an early version did not count them.
    """

    space: Space
    folder: str
    hash: str
    moments: FeatureMoments
    features: Tensor
    metrics: dict[str, float]
    held_out: int = 0


def make_reference(experiment: Experiment, space: Space, train: list[str], held_out: list[str]) -> Reference:
    """Image shards -> what is said of them in a space, made once for these images and this extractor.

    In the space of a published extractor it lies in <root>/references/<space>-<hash>, for all experiments on the same
    images; that of the classifier, which the experiment trains, in <folder>/reference/classifier. Beside what is read
    back lies statistics.npz, the mean `mu` and covariance `sigma` as ADM's evaluator takes them. No model is needed but
    the extractor, and where it is the classifier, that is trained here. Memory grows with the features that are kept,
    8 KiB an image in Inception's space, 16 in VGG16's, and none for Frechet distances alone.

    Args:
        experiment: its configuration.
        space: that `check_space` has found everything for.
        train: shards of training images.
        held_out: shards of held-out images.

    Raises:
        UserError: too many images that cannot be read.
    """
    config = experiment.evaluation
    fingerprint = {
        **experiment.fingerprint("data"),
        "shards": files.fingerprint([*train, *held_out]),
        "extractor": space.sha256 or f"classifier {experiment.study.classifier_steps}",
        "features": config.features_kept,
    }
    owner, name = experiment, f"{_STAGE}/{space.name}"
    if space.sha256:
        del fingerprint["seed"]  # nothing is drawn or trained
        digest = files.sha256(json.dumps(fingerprint, sort_keys=True).encode())
        owner, name = replace(experiment, name=_SHARED), f"{space.name}-{digest[:12]}"
    with open_stage(owner, name, fingerprint, _RESULT, on_change="redo", reads=train[:1], decodes=True) as stage:
        if not stage.done:
            _make(experiment, space, train, held_out, stage)
        made = read_record(stage.url(_RESULT))
        moments, features = FeatureMoments(), torch.zeros(0)
        if space.has_moments:
            tensors = load_tensors(files.read_bytes(stage.url(_MOMENTS)))
            moments = FeatureMoments(made["images"], tensors["mean"], tensors["scatter"])
        if config.features_kept:
            features = load_tensors(files.read_bytes(stage.url(_FEATURES)))["features"]
        counted = made.get("held_out_images", 0)
        return Reference(space, stage.folder, made["hash"], moments, features, made["figures"], counted)


def _make(experiment: Experiment, space: Space, train: list[str], held_out: list[str], stage: Stage) -> None:
    """Train the classifier where it is the extractor, take the features of all images, and write their moments."""
    metrics: dict[str, float] = {}
    if space.name == "classifier":
        folder = stage.url("classifier")
        work = map_on_actors(ClassifierTrainer, (experiment,), "train", [folder], experiment.cluster, "classifier")
        [metrics["classifier_accuracy"]] = work
    kept = experiment.evaluation.features_kept
    pieces = [TakeFeatures(url, kept) for url in train]
    if space.has_moments:
        pieces += [TakeFeatures(url, 0) for url in held_out]
    of_train, of_held_out, chosen, skipped = FeatureMoments(), FeatureMoments(), Selection(kept), Skipped()
    cluster, label = experiment.cluster, f"images to {space.name}"
    arguments, calls = (experiment, space), cluster.shards_at_once
    work = map_on_actors(FeatureActor, arguments, "take", pieces, cluster, label, calls, decodes=True)
    for number, seen in enumerate(work):
        (of_train if number < len(train) else of_held_out).merge(seen.moments)
        chosen.merge(seen.kept)
        skipped.merge(seen.skipped)
    skipped.check(experiment.data.max_skipped)
    digests: list[str] = []
    if space.has_moments:
        metrics[f"{space.metric_name('fd')}_held_out"] = frechet_distance(of_train, of_held_out)
        digests.append(_save(stage, _MOMENTS, {"mean": of_train.mean, "scatter": of_train.scatter}))
        statistics = io.BytesIO()
        np.savez(statistics, mu=of_train.mean.numpy(), sigma=of_train.covariance.numpy())
        stage.write(_STATISTICS, statistics.getvalue())
    if kept:
        digests.append(_save(stage, _FEATURES, {"features": chosen.features}))
    stage.run.metrics(metrics, 0)
    made = {"space": space.name, "sha256": space.sha256, "hash": files.sha256("".join(digests).encode())}
    images = of_train.count if space.has_moments else len(chosen.features)
    counts = {"images": images, "held_out_images": of_held_out.count}
    stage.write(_RESULT, files.json_bytes(_RESULT, made | counts | {"figures": metrics}))


def _save(stage: Stage, name: str, tensors: dict[str, Tensor]) -> str:
    data = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    stage.write(name, data)
    return files.sha256(data)


def make_references(experiment: Experiment, spaces: Sequence[Space]) -> list[Reference]:
    """The training images in each of `spaces`, once what these need has been found.

    Raises:
        UserError: no space, or as `check_space`, `check_shards` and `make_reference`.
    """
    if not spaces:
        raise UserError(
            "evaluation asks for no space to compare images in: set evaluation.frechet (Inception), "
            "evaluation.efficientnet_lite0 for photographs where there is no Inception, or evaluation.classifier for "
            "images with classes"
        )
    for space in spaces:
        check_space(experiment, space)
    train, held_out = (check_shards(experiment.data, split) for split in ("train", "validation"))
    return [make_reference(experiment, space, train, held_out) for space in spaces]
