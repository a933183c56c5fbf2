"""What an experiment has made so far: opened and checked once by each command, and handed down to whoever needs it."""

from __future__ import annotations

from dataclasses import dataclass

from bld_core.errors import MissingError, UserError
from bld_core.latents.reader import Latents, open_splits
from bld_core.prior.model import PriorModel
from bld_core.storage import files
from bld_core.trained import (
    AutoencoderRecord,
    PriorRecord,
    check_prior,
    has_prior,
    read_autoencoder,
    read_prior,
)
from cluster.config.experiment import Experiment

LATENTS = "latents"
"""Name of the stage, and of the folder, of the encoded data set."""


@dataclass(frozen=True)
class Codes:
    """An encoded data set.

    Attributes:
        train: what the prior learns from.
        held_out: the validation part.
    """

    train: Latents
    held_out: Latents


@dataclass(frozen=True)
class Artifacts:
    """What a command works with.

    Attributes:
        autoencoder: the finished autoencoder.
        prior: the finished prior, where there is one and the command asks for it.
        codes: the encoded data set, where the command asks for it.
    """

    autoencoder: AutoencoderRecord
    prior: PriorRecord | None = None
    codes: Codes | None = None

    @property
    def classes(self) -> int:
        """Classes of the prior; 0 without."""
        return 0 if self.prior is None else self.prior.prior.classes

    @property
    def model(self) -> PriorModel:
        """The model of the prior."""
        assert self.prior is not None, "whoever asks for the model has opened a prior"
        return self.prior.model(self.autoencoder.code_shape)

    @property
    def identity(self) -> dict[str, str]:
        """The hashes that a result which was made by them is known by."""
        identity = {"autoencoder_hash": self.autoencoder.hash}
        if self.prior is not None:
            identity |= {"prior_hash": self.prior.hash, "prior_run": self.prior.run}
        return identity


def open_autoencoder(experiment: Experiment, folder: str = "") -> Artifacts:
    """The finished autoencoder, binary and of this configuration.

    Args:
        experiment: its configuration.
        folder: experiment folder that holds it; by default the experiment's own.

    Raises:
        MissingError: stage 1 is not finished.
        UserError: it was trained for other images or another code, or has no bits.
    """
    autoencoder = read_autoencoder(folder or experiment.folder)
    experiment.check_autoencoder(autoencoder)
    return Artifacts(autoencoder)


def open_encoded(experiment: Experiment, folder: str = "") -> Artifacts:
    """The finished autoencoder and the data set that it has encoded: what a prior is trained on.

    Raises:
        MissingError: no autoencoder or no latents yet.
        UserError: as `open_autoencoder`; or the latents are another autoencoder's, hold too few held-out codes, or
            other classes than the prior is to have.
    """
    folder = folder or experiment.folder
    autoencoder = open_autoencoder(experiment, folder).autoencoder
    codes = open_codes(folder)
    if len(codes.held_out) < 2:
        raise UserError(
            f"{len(codes.held_out)} validation codes in {folder!r}; the likelihood bound and its error need at least "
            "2: add images to data.validation and encode again",
            stages=("latents",),
        )
    made_by = codes.train.manifest.autoencoder_hash
    if made_by != autoencoder.codes_hash:
        raise UserError(
            f"the latents in {folder!r} were made by autoencoder {made_by[:12]}, but the autoencoder there is "
            f"{autoencoder.codes_hash[:12]}: encode the data set again",
            stages=("latents",),
        )
    _check_classes(experiment, codes)
    return Artifacts(autoencoder, codes=codes)


def _check_classes(experiment: Experiment, codes: Codes) -> None:
    """Compare the classes of codes with those of the prior, before one is trained that never sees its classes."""
    classes = experiment.prior.classes
    most = max(codes.train.classes, codes.held_out.classes)
    if most > classes > 0:
        raise UserError(f"the latents hold class {most - 1}; prior.classes is {classes}: raise it")
    # Manifests of early versions do not say which classes there are: the codes do.
    if classes and not codes.train.classes and not (codes.train.read([0]).labels >= 0).any():
        raise UserError(
            f"prior.classes is {classes}, but the latents hold no class: set it to 0, or give the images classes and "
            "encode again",
            stages=("latents",),
        )


def open_trained(experiment: Experiment) -> Artifacts:
    """The finished autoencoder, and the prior where there is one, whatever this configuration says of them now.

    Raises:
        MissingError: stage 1 is not finished.
        UserError: prior and autoencoder do not belong together.
    """
    folder = experiment.folder
    autoencoder = read_autoencoder(folder)
    if not has_prior(folder):
        return Artifacts(autoencoder)
    prior = read_prior(folder)
    check_prior(folder, prior, autoencoder)
    return Artifacts(autoencoder, prior)


def open_pair(experiment: Experiment) -> Artifacts:
    """Autoencoder and prior, both finished.

    Raises:
        MissingError: a stage is not finished.
        UserError: they do not belong together.
    """
    found = open_trained(experiment)
    if found.prior is None:
        raise MissingError(f"{experiment.folder!r} has no finished prior: train it first", stages=("prior",))
    return found


def open_finished(experiment: Experiment) -> Artifacts:
    """All that is finished: stage 1, whatever its latent; with a prior, that and the latents that it was trained on.

    Raises:
        MissingError: stage 1 is not finished, or the latents of the prior are missing.
        UserError: autoencoder, configuration, latents and prior do not belong together.
    """
    folder, trained = experiment.folder, open_trained(experiment)
    autoencoder, prior = trained.autoencoder, trained.prior
    experiment.check_autoencoder(autoencoder, binary=prior is not None)
    if prior is None:
        return trained
    codes = open_codes(folder)
    if codes.train.hash != prior.latents_hash:
        raise UserError(
            f"the prior in {folder!r} was trained on latents {prior.latents_hash[:12]}, but those there are "
            f"{codes.train.hash[:12]}: bring the former back, or train the prior on these again",
            stages=("prior",),
        )
    return Artifacts(autoencoder, prior, codes)


def open_codes(folder: str) -> Codes:
    """Both parts of the encoded data set of an experiment folder; the errors are those of `open_latents`."""
    train, held_out = open_splits(files.join(folder, LATENTS), "train", "validation")
    return Codes(train, held_out)
