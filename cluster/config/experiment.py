"""One experiment = one file: the configuration that every stage reads, and the folder that every stage writes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import AugmentationConfig, ImageConfig
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.errors import UserError
from bld_core.latents.writer import LatentConfig
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.storage import files
from bld_core.trained import AutoencoderRecord
from bld_core.training.loop import TrainingConfig, worker_share
from cluster.config.tracking import TrackingConfig
from cluster.evaluation.config import EvaluationConfig, StudyConfig
from cluster.runtime import ClusterConfig
from cluster.secrets import check_no_password
from cluster.studio.config import ServeConfig
from cluster.sweep.config import SweepConfig

# What does not change what a stage makes, beyond rounding: how often it reports, how it saves time and memory, what it
# does with a bad step, when it gives up on bad data, and where a file lies whose sha256 is given.
_FREE = (
    *("log_every", "evaluate_every", "checkpoint_every", "non_finite", "max_skipped"),
    *(
        "accumulate",
        "fsdp",
        "compile",
        "channels_last",
        "checkpointing",
        "vgg_weights",
        "inception_weights",
        "dinov2_weights",
    ),
)
_BITS = ("latents.compile",)  # decides some, by rounding, where codes are drawn
_JOBS_COPY = "working_dir_files"  # Ray's folder for the code of `ray job submit`

# Settings that came later, and what all that was made before had. Where they still say that, no fingerprint names them:
# a stage of an older version is compared by them.
BEFORE = {
    "data.label_field": "",
    "data.class_names": "",
    "evaluation.efficientnet_lite0": False,
    "evaluation.mind": False,
    "autoencoder.patch": 1,
    "autoencoder.decoder_channels": 0,
    "autoencoder.decoder_blocks": 0,
    "loss.entropy_ramp": 0,
    "loss.adversarial_ramp": 0,
    "loss.lecam": 0.0,
    "loss.perceptual_network": "vgg16",
    "prior.group": 1,
    "prior.trunk": [],
    "prior.class_tokens": 0,
    "diffusion.calibration": "bayes",
    "sampling.guidance_interval": [0.0, 1.0],
    "latents.precision": "float32",
    "latents.compile": False,
    "prior_training.optimizer": "adamw",
    "autoencoder_training.optimizer": "adamw",
    "prior_training.ema_lengths": [],
    "autoencoder_training.ema_lengths": [],
    "prior_training.reduce_precision": "float32",
    "autoencoder_training.reduce_precision": "float32",
}


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
        diffusion: the Bernoulli diffusion, where the prior is one.
        prior_training: stage 2.
        sampling: how samples are drawn.
        evaluation: what is measured.
        sweep: the sweep over the settings of a stage.
        study: the studies.
        serve: the studio.
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
    study: StudyConfig = field(default_factory=StudyConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}; it must be a folder name without slashes or a leading dot")
        if self.data.fit == "pad" and self.augmentation.resize > 1:
            raise UserError(
                f"augmentation.resize is {self.augmentation.resize}, but data.fit is pad, which never scales an image; "
                "resize must then be 1: leave it out, or set data.fit to crop"
            )
        for setting, url in {
            "root": self.root,
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "data.class_names": self.data.class_names,
        }.items():
            check_no_password(setting, url)
        _check_places(self.root, self.data)
        # Workers have other working directories: paths are made absolute once, here.
        places = ("train", "validation", "class_names")
        shards = {name: files.absolute(url) for name in places if (url := getattr(self.data, name))}
        object.__setattr__(self, "root", files.absolute(self.root))
        object.__setattr__(self, "data", replace(self.data, **shards))
        h, w, c = self.code_shape
        if self.loss.entropy and self.autoencoder.latent != "binary":
            raise UserError(
                f"loss.entropy is {self.loss.entropy} with autoencoder.latent {self.autoencoder.latent}, which has no "
                "bits: set it to 0"
            )
        if self.autoencoder_training.ema_lengths:
            raise UserError(
                f"autoencoder_training.ema_lengths is {self.autoencoder_training.ema_lengths}, but averages are chosen "
                "by the prior's bound, which stage 1 has not: leave it out"
            )
        if self.autoencoder_training.fsdp:
            raise UserError(
                "autoencoder_training.fsdp is true, but weights are shared out in stage 2 alone: the networks of stage "
                "1 are small, and the weight of its critic takes gradients of whole ones; set it to false"
            )
        make_model(self.prior, self.diffusion, h * w, c).steps(self.sampling)
        for training in (self.autoencoder_training, self.prior_training):
            worker_share(training, self.cluster.replicas)

    @property
    def folder(self) -> str:
        """<root>/<name>."""
        return files.join(self.root, self.name)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return self.autoencoder.code_shape(self.data.image_size)

    def variant(self, part: str, name: str, **changes: Any) -> Experiment:
        """An experiment in <folder>/<part>/<name> for another prior on the same latents, tracked beside this one."""
        tracking = replace(
            self.tracking,
            uri=self.tracking.resolve(self.root),
            experiment=self.tracking.experiment or self.name,
        )
        return replace(self, name=name, root=files.join(self.folder, part), tracking=tracking, **changes)

    def check_autoencoder(self, trained: AutoencoderRecord, *, binary: bool = True) -> None:
        """Compare a trained autoencoder with this configuration.

        Args:
            trained: its record.
            binary: whether what follows needs its bits.

        Raises:
            UserError: it was trained for other images or another code, or has no bits where they are needed.
        """
        if binary:
            trained.check_binary()
        expected = {"code_shape": self.code_shape, "image_size": self.data.image_size, "channels": self.data.channels}
        wrong = [
            f"{name} {found} (configured: {value})"
            for name, value in expected.items()
            if (found := getattr(trained, name)) != value
        ]
        if wrong:
            raise UserError(
                f"the trained autoencoder {trained.hash[:12]} has {', '.join(wrong)}: set data and autoencoder "
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
        decide = {name: value for name, value in chosen.items() if name in _BITS or name.split(".")[-1] not in _FREE}
        return {name: value for name, value in decide.items() if name not in BEFORE or value != BEFORE[name]}


def _check_places(root: str, data: ImageConfig) -> None:
    """Refuse what is relative to the copy of the code in which Ray runs a job."""
    if _JOBS_COPY not in os.getcwd().split(os.sep):
        return
    given = {"root": root, "data.train": data.train, "data.validation": data.validation}
    given |= {"data.class_names": data.class_names}
    for setting, url in given.items():
        for source in files.sources(url) if url else []:
            if "://" not in source and not source.startswith(("/", "~")):
                raise UserError(
                    f"{setting} is {source!r}, relative to the copy of the code that Ray has made for this job, of "
                    "which other nodes and later jobs know nothing: give an absolute path or a URL that all nodes reach"
                )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
