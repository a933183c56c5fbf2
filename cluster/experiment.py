"""One experiment = one file: the configuration that every stage reads, and the folder that every stage writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bld_core import files
from bld_core.autoencoder import AutoencoderConfig
from bld_core.diffusion import DiffusionConfig, check_grid
from bld_core.images import AugmentationConfig, ImageConfig
from bld_core.latents import LatentConfig
from bld_core.losses import LossConfig
from bld_core.prior import PriorConfig
from bld_core.sampling import SamplingConfig
from bld_core.schedule import ScheduleName
from bld_core.training import TrainingConfig, worker_share
from cluster.features import INCEPTION
from cluster.runtime import ClusterConfig
from cluster.tracking import TrackingConfig

# What does not change what a stage makes, beyond rounding: how often it reports, how it saves time and memory, what it
# does with a bad step, when it gives up on bad data, and where a file lies whose sha256 is given.
_FREE = (
    *("log_every", "evaluate_every", "checkpoint_every", "non_finite", "max_skipped"),
    *("accumulate", "compile", "channels_last", "checkpointing", "vgg_weights", "inception_weights"),
)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation of a finished experiment.

    Args:
        samples: images drawn; their classes are balanced.
        batch_size: images in one piece of work.
        lpips: also measure the LPIPS distance of reconstructions, with the VGG16 weights of `loss`.
        frechet: also measure the Frechet distance between held-out images and their reconstructions, in the features of
            torch-fidelity's Inception; called rfid with the true weights only.
        inception_weights: local file of those weights; empty downloads them.
        inception_sha256: sha256 of that file in lower-case hex, or its first digits, at least 8.
        class_accuracy: also train a logistic regression on the pixels of the training images, and report the share
            of samples that it recognises as the class asked for; for small images with classes.
    """

    samples: int = 500
    batch_size: int = 100
    lpips: bool = False
    frechet: bool = False
    inception_weights: str = ""
    inception_sha256: str = INCEPTION.sha256
    class_accuracy: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"evaluation.samples is {self.samples}, evaluation.batch_size {self.batch_size}; "
                "both must be at least 1"
            )
        INCEPTION.check_settings(self.inception_weights, self.inception_sha256)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The sweep over prior training: every combination is one trial on the cached latents.

    Args:
        vlb_weights: values of diffusion.vlb_weight (lambda).
        schedules: values of diffusion.schedule.
        steps: training steps of each trial.
        concurrent: trials that run at the same time; together they must fit the cluster.
    """

    vlb_weights: list[float] = field(default_factory=lambda: [0.0, 0.1])
    schedules: list[ScheduleName] = field(default_factory=lambda: ["linear", "cosine"])
    steps: int = 10_000
    concurrent: int = 1

    def __post_init__(self) -> None:
        if not self.vlb_weights or not self.schedules:
            raise ValueError("sweep.vlb_weights and sweep.schedules must each name at least one value")
        if self.steps < 1 or self.concurrent < 1:
            raise ValueError(
                f"sweep.steps is {self.steps}, sweep.concurrent {self.concurrent}; both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: its images, networks, training, evaluation and machines.

    Args:
        name: of the experiment; its folder is <root>/<name>.
        root: where experiments live, a local folder or a URL such as s3://bucket/path.
        seed: of everything random.
        data: the images.
        augmentation: how they vary in stage 1.
        autoencoder: the binary autoencoder.
        loss: what the autoencoder minimises.
        autoencoder_training: stage 1.
        latents: the encoded data set.
        prior: the transformer prior.
        diffusion: the Bernoulli diffusion.
        prior_training: stage 2.
        sampling: how samples are drawn.
        evaluation: what is measured.
        sweep: the sweep over prior training.
        cluster: where and how wide the work runs.
        tracking: MLflow.
    """

    name: str = "experiment"
    root: str = "runs"
    seed: int = 0
    data: ImageConfig = field(default_factory=ImageConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    autoencoder_training: TrainingConfig = field(default_factory=TrainingConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    prior_training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}; it must be a folder name without slashes or a leading dot")
        if self.data.fit == "pad" and self.augmentation.resize > 1:
            raise ValueError(
                f"augmentation.resize is {self.augmentation.resize}, but data.fit is pad, which never scales an image; "
                "resize must then be 1: leave it out, or set data.fit to crop"
            )
        # Workers have other working directories: paths are made absolute once, here.
        shards = {split: files.absolute(url) for split in ("train", "validation") if (url := getattr(self.data, split))}
        object.__setattr__(self, "root", files.absolute(self.root))
        object.__setattr__(self, "data", replace(self.data, **shards))
        self.autoencoder.code_shape(self.data.image_size)
        if self.loss.entropy and self.autoencoder.latent != "binary":
            raise ValueError(
                f"loss.entropy is {self.loss.entropy} with autoencoder.latent {self.autoencoder.latent}, which has no "
                "bits: set it to 0"
            )
        if self.loss.adversarial and self.autoencoder_training.compile:
            raise ValueError(
                "autoencoder_training.compile is on with loss.adversarial above 0: a compiled network goes backwards "
                "as a whole, and the adaptive weight would do so twice more; set compile to false"
            )
        schedule = self.diffusion.make_schedule()
        check_grid(self.sampling.times(schedule), schedule, self.diffusion.target)
        for training in (self.autoencoder_training, self.prior_training):
            worker_share(training, self.cluster.workers)

    @property
    def folder(self) -> str:
        """<root>/<name>."""
        return files.join(self.root, self.name)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return self.autoencoder.code_shape(self.data.image_size)

    def check_autoencoder(self, trained: Mapping[str, Any]) -> None:
        """Compare a trained autoencoder's config.json with this configuration.

        Raises:
            ValueError: it was trained for other images or another code.
        """
        expected = {
            "code_shape": list(self.code_shape),
            "image_size": self.data.image_size,
            "channels": self.data.channels,
        }
        if trained["autoencoder"]["latent"] != "binary":
            raise ValueError(
                f"the trained autoencoder {trained['hash'][:12]} has a {trained['autoencoder']['latent']} latent, "
                "which has no bits: it is there for comparison; train one with autoencoder.latent binary under another "
                "--name"
            )
        wrong = [
            f"{name} {trained[name]} (configured: {value})"
            for name, value in expected.items()
            if trained[name] != value
        ]
        if wrong:
            raise ValueError(
                f"the trained autoencoder {trained['hash'][:12]} has {', '.join(wrong)}: set data and autoencoder "
                "back to what it was trained with, or train another one under another --name"
            )

    def parameters(self) -> dict[str, str]:
        """Every field by its dotted name, as text: what MLflow shows."""
        return {name: str(value) for name, value in _flatten(asdict(self)).items()}

    def fingerprint(self, *sections: str) -> dict[str, Any]:
        """The fields of the named sections that decide what a stage makes, by dotted name.

        The rest of them may change between an interruption and its resume.
        """
        chosen = _flatten({name: value for name, value in asdict(self).items() if name in ("seed", *sections)})
        return {name: value for name, value in chosen.items() if name.split(".")[-1] not in _FREE}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
