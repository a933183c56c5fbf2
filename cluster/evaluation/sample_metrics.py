"""Metrics of samples: from sums where that is possible, from kept features by torch-fidelity where it is not."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from bld_core.data.images import first_images
from bld_core.data.tensors import stack
from bld_core.errors import UserError
from bld_core.metrics.bootstrap import FrechetBootstrap
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.inception_score import InceptionScore
from bld_core.metrics.mind import mind
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn
from cluster.evaluation.config import KERNEL_SUBSET, KERNEL_SUBSETS, NEIGHBOURHOOD, SPLITS, EvaluationConfig
from cluster.evaluation.export import samples_npz
from cluster.evaluation.references import Reference

SHOWN = 80  # samples of the picture
SAMPLES = "samples.npz"
"""What the samples are exported to."""
_CLASSIFIER_IMAGES = 5000
_ROWS_AT_ONCE = 1000  # of a table of distances: 200 MB for 50,000 columns


class Samples:
    """What is made of drawn images as they come, in the order of their indices.

    Of the images the first 80 are kept; what else grows with their number is said of `SampleMetrics`.

    Args:
        config: what is measured.
        experiment: whose samples they are.
        references: the training images, in every space.
        labels: the class of each sample.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        experiment: Experiment,
        references: Sequence[Reference],
        labels: list[int] | None,
    ) -> None:
        self.experiment, self.labels = experiment, labels
        self._by_space = [SampleMetrics(config, reference, experiment.seed) for reference in references]
        self._accuracy = ClassAccuracy(experiment) if config.class_accuracy and labels is not None else None
        self._shown: list[Tensor] = []
        self._write: Callable[[Tensor], None] | None = None

    @property
    def shown(self) -> Tensor:
        """The first images, uint8 (B, H, W, channels)."""
        return torch.cat(self._shown)[:SHOWN]

    @contextlib.contextmanager
    def exported(self, folder: str) -> Generator[None]:
        """Write what is added to <folder>/samples.npz."""
        config, data = self.experiment.evaluation, self.experiment.data
        shape = (config.samples, data.image_size, data.image_size, data.channels)
        with samples_npz(files.join(folder, SAMPLES), shape, self.labels) as self._write:
            yield

    def add(self, drawn: Drawn) -> None:
        """Add the next images."""
        for metrics in self._by_space:
            metrics.update(drawn.features[metrics.reference.space.name], drawn.logits, drawn.first_index)
        if drawn.images is None:
            return
        if drawn.first_index < SHOWN:
            self._shown.append(drawn.images)
        if self._accuracy is not None and self.labels is not None:
            self._accuracy.update(drawn.images, self.labels[drawn.first_index :][: len(drawn.images)])
        if self._write is not None:
            self._write(drawn.images)

    def metrics(self) -> dict[str, float]:
        """The metrics by name; the distances of held-out images stand beside those of samples."""
        found: dict[str, float] = {}
        ratios: list[float] = []
        for each in self._by_space:
            metrics = each.metrics()
            found |= metrics
            ratios += [value for name, value in metrics.items() if name == each.reference.space.metric_name("fdr")]
            real = each.reference.metrics
            found |= {name: value for name, value in real.items() if name.endswith("_held_out")}
        if len(ratios) > 1:
            found["fdr_mean"] = statistics.fmean(ratios)
        return found | (self._accuracy.metrics() if self._accuracy is not None else {})


def over_seeds(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of several sets of samples: the means, with the deviation (n - 1) of each as `_sd`.

    Args:
        found: the metrics of each set; the first may have some that the others lack, which stay as they are.
    """
    metrics = dict(found[0])
    for name in found[-1] if len(found) > 1 else ():
        values = [one[name] for one in found]
        metrics[name] = statistics.fmean(values)
        if not name.endswith(("_std", "_se", "_held_out")):
            metrics[f"{name}_sd"] = statistics.stdev(values)
    return metrics


class ClassAccuracy:
    """How often a logistic regression on real pixels sees the class that was asked for; and how good it is itself."""

    def __init__(self, experiment: Experiment) -> None:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        self.data = experiment.data
        with threadpool_limits(1):  # its products are small: where a core is busy, threads only wait for each other
            self._classifier = LogisticRegression(max_iter=1000).fit(*self._table(self.data.train))
        self._right, self._seen = 0, 0

    def _table(self, pattern: str) -> tuple[Any, list[int]]:
        images = first_images(pattern, self.data, _CLASSIFIER_IMAGES)
        return _pixels(stack(images)), [image.label for image in images]

    def update(self, images: Tensor, labels: Sequence[int]) -> None:
        """Add images, uint8 (B, H, W, channels), and the classes asked for."""
        self._right += int((self._classifier.predict(_pixels(images)) == labels).sum())
        self._seen += len(images)

    def metrics(self) -> dict[str, float]:
        """The two shares."""
        return {
            "class_accuracy": self._right / self._seen,
            "class_accuracy_real": float(self._classifier.score(*self._table(self.data.validation))),
        }


def _pixels(images: Tensor) -> Any:
    return images.flatten(1).numpy() / 255.0


class SampleMetrics:
    """The metrics of one set of samples against the training images.

    Frechet distance, its error and the Inception score come from sums in float64: memory does not grow with the number
    of samples. Kernel distance, MIND, precision and recall keep the features, 4 F bytes a sample (8 KiB in Inception's
    space, 16 in VGG16's), and the reference as many of training images.

    Args:
        config: what is measured.
        reference: the training images.
        seed: of the bootstrap.
    """

    def __init__(self, config: EvaluationConfig, reference: Reference, seed: int) -> None:
        space = reference.space
        self.reference = reference
        self._moments = FeatureMoments()
        self._as_many = FeatureMoments()  # of the first samples, as many as there are held-out images
        self._bootstrap = FrechetBootstrap(config.bootstrap if space.has_moments else 0, seed)
        self._errors = config.bootstrap > 0
        inception = space.name == "inception"
        self._score = InceptionScore(config.samples, SPLITS) if inception and config.inception_score else None
        self._kernel, self._precision_recall = space.has_kernel_distances and config.kid, config.precision_recall
        self._mind = config.mind and space.has_moments
        self._kept: list[Tensor] = []

    def update(self, features: Tensor, logits: Tensor | None, first_index: int) -> None:
        """Add samples `first_index`, `first_index` + 1, ...: their features, and logits for the Inception score."""
        if self.reference.space.has_moments:
            self._moments.update(features)
            self._as_many.update(features[: self.reference.held_out - self._as_many.count])
            self._bootstrap.update(features, first_index)
        if self._score is not None:
            assert logits is not None, "whoever asks for the score takes logits, too"
            self._score.update(logits, first_index)
        if self._kernel or self._mind or self._precision_recall:
            self._kept.append(features)

    def metrics(self) -> dict[str, float]:
        """The metrics by name."""
        space, reference, found = self.reference.space, self.reference, dict[str, float]()
        if space.has_moments:
            found[space.metric_name("fd")] = frechet_distance(reference.moments, self._moments)
            if self._errors:
                found[f"{space.metric_name('fd')}_se"] = self._bootstrap.standard_error(reference.moments)
            real = reference.metrics.get(f"{space.metric_name('fd')}_held_out", 0.0)
            if self._as_many.count > 1 and real > 0:  # held-out images that are all trained on say nothing
                found[space.metric_name("fdr")] = frechet_distance(reference.moments, self._as_many) / real
        if self._score is not None:
            scores, name = self._score.scores(), space.metric_name("is")
            found |= {name: float(scores.mean()), f"{name}_std": float(scores.std(correction=0))}
        if self._kept:
            samples = torch.cat(self._kept)
            if self._kernel:
                name = space.metric_name("kd")
                found[name], found[f"{name}_std"] = kernel_distance(samples, reference.features)
            if self._mind:
                found[space.metric_name("mind")] = mind(samples, reference.features)
            if self._precision_recall:
                precision, recall = precision_recall(samples, reference.features)
                found |= {space.metric_name("precision"): precision, space.metric_name("recall"): recall}
        return found


def check_references(config: EvaluationConfig, references: Sequence[Reference]) -> None:
    """Count the training images that metrics are taken of, before a sample is drawn.

    Raises:
        UserError: fewer than 1,000 for a kernel distance, or than 4 for precision and recall.
    """
    for reference in references:
        count = len(reference.features)
        if config.kid and reference.space.has_kernel_distances:
            _check_kernel_distance(count, "real images")
        if config.precision_recall:
            _check_precision_recall(count, "real images")


def _check_kernel_distance(count: int, what: str) -> None:
    if count < KERNEL_SUBSET:
        raise UserError(
            f"{count} {what} for a kernel distance of subsets of {KERNEL_SUBSET}; it needs as many: add some, or set "
            "evaluation.kid to false"
        )


def _check_precision_recall(count: int, what: str) -> None:
    if count <= NEIGHBOURHOOD:
        raise UserError(
            f"{count} {what} for precision and recall, which look at the {NEIGHBOURHOOD} nearest others; it needs "
            "more: add some, or set evaluation.precision_recall to false"
        )


def kernel_distance(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """torch-fidelity's kernel distance (KID: Binkowski et al. 2018), its mean and deviation over the subsets.

    Args:
        samples: features, float32 (N, F), of drawn images, at least 1,000.
        real: the same of real images.

    Raises:
        UserError: fewer than 1,000 of either.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    for what, features in (("samples", samples), ("real images", real)):
        _check_kernel_distance(len(features), what)
    settings = {"kid_subsets": KERNEL_SUBSETS, "kid_subset_size": KERNEL_SUBSET, "verbose": False}
    found = kid_features_to_metric(samples, real, **settings)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """torch-fidelity's precision and recall (Kynkaanniemi et al. 2019), k = 3.

    Precision is the share of samples that lie no farther from some real image than its 3rd nearest real one does;
    recall that of real images, with the roles exchanged.

    Args:
        samples: features, float32 (N, F), of drawn images, at least 4.
        real: the same of real images.

    Raises:
        UserError: fewer than 4 of either.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    for what, features in (("samples", samples), ("real images", real)):
        _check_precision_recall(len(features), what)
    settings = {"prc_neighborhood": NEIGHBOURHOOD, "prc_batch_size": _ROWS_AT_ONCE}
    found = prc_features_to_metric(samples, real, save_cpu_ram=True, verbose=False, **settings)
    return found["precision"], found["recall"]
