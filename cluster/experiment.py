"""One experiment = one file: the configuration that every stage reads, and the folder that every stage writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bld_core import files
from bld_core.autoencoder import AutoencoderConfig
from bld_core.diffusion import DiffusionConfig
from bld_core.generator import check_binary
from bld_core.images import AugmentationConfig, ImageConfig
from bld_core.latent_shards import LatentConfig
from bld_core.losses import LossConfig
from bld_core.models import make_model
from bld_core.prior import PriorConfig
from bld_core.sampling import SamplingConfig
from bld_core.schedule import ScheduleName
from bld_core.secrets import check_no_password, has_user
from bld_core.training import TrainingConfig, worker_share
from cluster.measures import EvaluationConfig
from cluster.runtime import ClusterConfig

# What does not change what a stage makes, beyond rounding: how often it reports, how it saves time and memory, what it
# does with a bad step, when it gives up on bad data, and where a file lies whose sha256 is given.
_FREE = (
    *("log_every", "evaluate_every", "checkpoint_every", "non_finite", "max_skipped"),
    *("accumulate", "compile", "channels_last", "checkpointing", "vgg_weights", "inception_weights", "dinov2_weights"),
)

# What MLflow can keep runs in: a server by HTTP, Databricks, or a database.
_TRACKING_URI = re.compile(
    r"https?://(?:\[[\da-f:.]+\]|[^\s/:?#\[\]]+)(?::\d+)?(?:/.*)?|databricks(?:://.+)?"
    r"|(?:sqlite|postgresql|mysql|mssql)(?:\+\w+)?://.*[^/].*",
    re.DOTALL,
)

CHAMPION = "champion"
"""Registry alias of the best version: it moves by a rule."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow.

    Args:
        uri: tracking server, for example http://mlflow:5000; empty keeps a SQLite file, mlflow.db, in `root`, which is
            enough for one machine. Credentials belong in the MLFLOW_TRACKING_* variables, never here.
        experiment: MLflow experiment that holds the runs; empty takes the name of this experiment.
        model: name in the model registry; empty takes the name of this experiment.
        alias: registry alias that `register.py` moves to the version that it makes; not `champion`, which moves by the
            rule of the next three.
        champion_figure: figure of evaluation/report.json by which a version becomes `champion`. The bound compares
            priors on the same latents; across autoencoders or latents take a figure of images.
        champion_lower: the lower figure is the better one.
        champion_margin: by how much, in the figure's own unit, a version must be better than the champion to follow it.
    """

    uri: str = ""
    experiment: str = ""
    model: str = ""
    alias: str = "latest-trained"
    champion_figure: str = "bound"
    champion_lower: bool = True
    champion_margin: float = 0.001

    def __post_init__(self) -> None:
        if has_user(self.uri):
            raise ValueError(
                "tracking.uri holds a user name or a password, which would be written into logs and runs: leave it out "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        if self.uri and not _TRACKING_URI.fullmatch(self.uri):
            raise ValueError(
                f"tracking.uri is {self.uri!r}; it must be an MLflow server, for example http://mlflow:5000, or a "
                "database by sqlite:///, postgresql://, mysql:// or mssql://: MLflow keeps no runs elsewhere, folders "
                "included; leave it out for a SQLite file in root"
            )
        if not re.fullmatch(r"[^/:]*", self.model):
            raise ValueError(f"tracking.model is {self.model!r}; MLflow allows neither / nor : in it: choose another")
        if self.alias.lower() == CHAMPION:
            raise ValueError(
                f"tracking.alias is {self.alias!r}, which moves only by the rule of tracking.champion_figure and "
                "tracking.champion_margin, and by itself when you register: choose another name, or leave it out"
            )
        if not re.fullmatch(r"[\w-]+", self.alias) or re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise ValueError(
                f"tracking.alias is {self.alias!r}; MLflow wants letters, digits, _ and -, and keeps latest and "
                "v<number> for itself: choose another name, for example latest-trained"
            )
        if not self.champion_margin >= 0:
            raise ValueError(f"tracking.champion_margin is {self.champion_margin}; it must be 0 or more")

    def resolve(self, root: str) -> str:
        """The tracking URI for an experiment root.

        Raises:
            ValueError: no server for a root on object storage.
        """
        if self.uri:
            return self.uri
        if not files.is_local(root):
            raise ValueError(
                f"root {root!r} is not a local folder, and SQLite needs one: set tracking.uri to an MLflow server"
            )
        return f"sqlite:///{files.absolute(root)}/mlflow.db"


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
class StudyConfig:
    """The studies: what they compare, and how much they look at.

    Args:
        training_steps: training steps of each variant of the prior; 0 takes those of prior_training, and then the
            experiment's own prior is the variant with its settings.
        samples: images drawn for each row of a table.
        codes: held-out codes that each bound is measured on, at most.
        classifier_steps: training steps, 128 images each, of the classifier in whose features images are compared where
            evaluation.frechet is false.
        vlb_weights: values of diffusion.vlb_weight of the study lambda.
        steps: numbers of sampling steps of the study steps; those above T are left out.
        temperatures: values of sampling.temperature of the study temperature.
    """

    training_steps: int = 0
    samples: int = 5000
    codes: int = 1024
    classifier_steps: int = 600
    vlb_weights: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.1, 1.0])
    steps: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128, 256])
    temperatures: list[float] = field(default_factory=lambda: [0.6, 0.7, 0.8, 0.9, 1.0, 1.1])

    def __post_init__(self) -> None:
        if self.training_steps < 0:
            raise ValueError(f"study.training_steps is {self.training_steps}; it must be 0 (as prior_training) or more")
        if self.classifier_steps < 1:
            raise ValueError(f"study.classifier_steps is {self.classifier_steps}; it must be at least 1")
        for name in ("samples", "codes"):
            if getattr(self, name) < 2:
                raise ValueError(f"study.{name} is {getattr(self, name)}; moments and errors need at least 2")
        for name in ("vlb_weights", "steps", "temperatures"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"study.{name} is {values}; it must name at least one value, and none twice")


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
        sweep: the sweep over prior training.
        study: the studies.
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
        for setting, url in {
            "root": self.root,
            "data.train": self.data.train,
            "data.validation": self.data.validation,
        }.items():
            check_no_password(setting, url)
        # Workers have other working directories: paths are made absolute once, here.
        shards = {split: files.absolute(url) for split in ("train", "validation") if (url := getattr(self.data, split))}
        object.__setattr__(self, "root", files.absolute(self.root))
        object.__setattr__(self, "data", replace(self.data, **shards))
        h, w, c = self.code_shape
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

    def variant(self, place: str, name: str, **changes: Any) -> Experiment:
        """An experiment in <folder>/<place>/<name> for another prior on the same latents, tracked beside this one."""
        tracking = replace(
            self.tracking,
            uri=self.tracking.resolve(self.root),
            experiment=self.tracking.experiment or self.name,
        )
        return replace(self, name=name, root=files.join(self.folder, place), tracking=tracking, **changes)

    def check_autoencoder(self, trained: Mapping[str, Any], *, binary: bool = True) -> None:
        """Compare a trained autoencoder's config.json with this configuration.

        Args:
            trained: that file.
            binary: whether what follows needs its bits.

        Raises:
            ValueError: it was trained for other images or another code, or has no bits where they are needed.
        """
        expected = {
            "code_shape": list(self.code_shape),
            "image_size": self.data.image_size,
            "channels": self.data.channels,
        }
        if binary:
            check_binary(trained)
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
