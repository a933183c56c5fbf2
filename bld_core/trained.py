"""Finished stages: their config.json as typed records, and their networks, opened with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import Autoencoder, AutoencoderConfig
from bld_core.autoencoder.quantizer import quantize
from bld_core.data.tensors import to_float, to_uint8
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.errors import DamagedError, UserError
from bld_core.precision import ieee_float32
from bld_core.prior.model import PriorModel, make_model
from bld_core.prior.older import SingleStepModel
from bld_core.prior.transformer import PriorConfig
from bld_core.storage import files
from bld_core.training.checkpoint import CONFIG, load_weights, read_model_config

AUTOENCODER = "autoencoder/final"
DECODER = "decoder/final"
"""The same autoencoder, its decoder fine-tuned: where there is one, it decodes."""
PRIOR = "prior/final"
_PIXELS_AT_ONCE = 1 << 22  # in one pass of the autoencoder: 64 images of 256 x 256, 4 of 1024 x 1024


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecord:
    """What config.json says of a finished autoencoder.

    Attributes:
        hash: sha256 of the weights.
        codes_of: `hash` of the autoencoder whose encoder it has, where its decoder was fine-tuned.
        autoencoder: the networks.
        code_shape: (h, w, c).
        image_size: side of its images in pixels.
        channels: of its images.
        data_hash: of the names and sizes of its training shards; early versions did not note it.
        run: the MLflow run that trained it.
        metrics: of its last evaluation in training.
    """

    hash: str
    autoencoder: AutoencoderConfig
    code_shape: tuple[int, int, int]
    image_size: int
    channels: int
    data_hash: str = "unknown"
    run: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    codes_of: str = ""

    @property
    def codes_hash(self) -> str:
        """What its codes are known by: latents and priors belong to it by this hash, whatever decodes them."""
        return self.codes_of or self.hash

    def check_binary(self) -> None:
        """Whether it has bits.

        Raises:
            UserError: its latent is another: it is there for comparison, and can only reconstruct.
        """
        if self.autoencoder.latent != "binary":
            raise UserError(
                f"the trained autoencoder {self.hash[:12]} has a {self.autoencoder.latent} latent, which has no bits: "
                "it is there for comparison, and can only reconstruct; train another one with `latent` binary"
            )


@dataclass(frozen=True, kw_only=True)
class PriorRecord:
    """What config.json says of a finished prior.

    Attributes:
        hash: sha256 of the weights.
        prior: the network.
        diffusion: the diffusion, where the prior is one.
        sampling: how it is to be sampled, unless somebody asks otherwise.
        autoencoder_hash: `codes_hash` of the autoencoder whose codes it learned.
        latents_hash: of the encoded data set.
        run: the MLflow run that trained it.
        metrics: of its last evaluation in training.
        class_names: of its classes by number, where they have names.
        single_step: it is of target z_prev and from an early version, which had another network for it.
    """

    hash: str
    prior: PriorConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    autoencoder_hash: str = ""
    latents_hash: str = ""
    run: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    class_names: Sequence[str] = ()
    single_step: bool = False

    def headings(self, labels: Sequence[int]) -> list[str]:
        """The names of classes, "" for none; empty where there are no names that say more than the numbers."""
        if not any(name != str(number) for number, name in enumerate(self.class_names)):
            return []
        return [self.class_names[label] if 0 <= label < len(self.class_names) else "" for label in labels]

    def label(self, named: int | str) -> int:
        """The number of a class that is named, or given as its number, which is not checked.

        Raises:
            UserError: no class has this name.
        """
        if isinstance(named, int):
            return named
        if named not in self.class_names:
            known = f"its classes are {', '.join(self.class_names)}" if self.class_names else "its classes are numbers"
            raise UserError(f"class {named!r} asked for, of which the prior knows nothing: {known}")
        return self.class_names.index(named)

    def model(self, code_shape: tuple[int, int, int]) -> PriorModel:
        """The model that it is, of codes (h, w, c)."""
        h, w, c = code_shape
        if self.single_step:
            return SingleStepModel(self.prior, self.diffusion, h * w, c)
        return make_model(self.prior, self.diffusion, h * w, c)


def _known(record: type, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record among those of a file, which may have others."""
    return {part.name: found[part.name] for part in fields(record) if part.name in found}


def _config(folder: str, place: str) -> dict[str, Any]:
    """The config.json of one of the models; that of the other in its place is damage, too."""
    found, stage = read_model_config(files.join(folder, place)), "prior" if place == PRIOR else "autoencoder"
    if stage not in found:
        raise DamagedError(
            files.join(folder, place, CONFIG), f"is not the record of a finished {stage}: it was replaced", (stage,)
        )
    return found


def autoencoder_place(folder: str) -> str:
    """Which autoencoder of an experiment's folder is used: `DECODER` where there is one, or `AUTOENCODER`."""
    return DECODER if files.exists(files.join(folder, DECODER, CONFIG)) else AUTOENCODER


def read_autoencoder(folder: str, place: str = "") -> AutoencoderRecord:
    """The record of an experiment's autoencoder.

    Args:
        folder: of the experiment.
        place: AUTOENCODER or DECODER; by default the one that is used.

    Raises:
        UserError: its decoder was fine-tuned for another encoder; and the errors of `read_model_config`.
    """
    place = place or autoencoder_place(folder)
    found = _known(AutoencoderRecord, _config(folder, place))
    found["autoencoder"] = AutoencoderConfig(**found["autoencoder"])
    found["code_shape"] = tuple(found["code_shape"])
    record = AutoencoderRecord(**found)
    if place == DECODER and record.codes_hash != (made_by := read_autoencoder(folder, AUTOENCODER).codes_hash):
        raise UserError(
            f"the decoder in {files.join(folder, DECODER)!r} was fine-tuned for codes of autoencoder "
            f"{record.codes_hash[:12]}, but the autoencoder there is {made_by[:12]}: fine-tune it again",
            stages=("decoder",),
        )
    return record


def read_prior(folder: str) -> PriorRecord:
    """The record of `<folder>/prior/final`; the errors are those of `read_model_config`."""
    found = _known(PriorRecord, _config(folder, PRIOR))
    diffusion = found["diffusion"]
    found["single_step"] = diffusion.get("target") == "z_prev" and "calibration" not in diffusion
    found["prior"].setdefault("trunk", [])  # the only one that early versions had
    found["prior"] = PriorConfig(**found["prior"])
    found["diffusion"] = DiffusionConfig(**found["diffusion"])
    found["sampling"] = SamplingConfig(**found["sampling"])
    return PriorRecord(**found)


def has_prior(folder: str) -> bool:
    """Whether stage 2 of an experiment's folder is finished."""
    return files.exists(files.join(folder, PRIOR, CONFIG))


@dataclass(frozen=True)
class TrainedAutoencoder:
    """A finished stage 1: the network, in evaluation mode, and its record."""

    network: Autoencoder
    record: AutoencoderRecord

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.record.code_shape

    @property
    def _at_once(self) -> int:
        """Images in one pass: few where they are large."""
        return max(1, _PIXELS_AT_ONCE // self.record.image_size**2)

    @ieee_float32()
    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images (B, H, W, channels) -> what is left of them behind the latent, without its noise; the same."""
        return torch.cat([to_uint8(self.network(to_float(some))[0]) for some in images.split(self._at_once)])

    @ieee_float32()
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (B, H, W, channels) -> their likeliest codes, uint8 0/1 (B, h, w, c)."""
        logits = [self.network.encode(to_float(some)) for some in images.split(self._at_once)]
        return quantize(torch.cat(logits)).permute(0, 2, 3, 1).to(torch.uint8)

    @ieee_float32()
    @torch.no_grad()
    def decode(self, bits_BHWC: Tensor) -> Tensor:
        """Codes (B, h, w, c) of 0/1 -> uint8 images (B, H, W, channels)."""
        z_BCHW = bits_BHWC.float().permute(0, 3, 1, 2)
        return torch.cat([to_uint8(self.network.decode(z)) for z in z_BCHW.split(self._at_once)])


@dataclass(frozen=True)
class TrainedPrior:
    """A finished stage 2: the network, in evaluation mode, its record, and the model that it names."""

    network: nn.Module
    record: PriorRecord
    model: PriorModel


def load_autoencoder(folder: str, device: str = "cpu") -> TrainedAutoencoder:
    """Open an experiment's autoencoder, whatever its latent; see `bld_core.load` for the errors."""
    place = autoencoder_place(folder)
    record = read_autoencoder(folder, place)
    network = make_autoencoder(record.autoencoder, record.channels)
    load_weights(files.join(folder, place), network, record.hash, device)
    return TrainedAutoencoder(network, record)


def load_prior(folder: str, autoencoder: TrainedAutoencoder, device: str = "cpu") -> TrainedPrior:
    """Open `<folder>/prior/final`.

    Raises:
        UserError: it was trained on the codes of another autoencoder.
    """
    record = read_prior(folder)
    check_prior(folder, record, autoencoder.record)
    model = record.model(autoencoder.code_shape)
    network = model.network()
    load_weights(files.join(folder, PRIOR), network, record.hash, device)
    return TrainedPrior(network, record, model)


def check_prior(folder: str, prior: PriorRecord, autoencoder: AutoencoderRecord) -> None:
    """Whether prior and autoencoder belong together.

    Raises:
        UserError: the prior was trained on the codes of another autoencoder.
    """
    if prior.autoencoder_hash != autoencoder.codes_hash:
        raise UserError(
            f"the prior in {files.join(folder, PRIOR)!r} was trained on codes of autoencoder "
            f"{prior.autoencoder_hash[:12]}, but the autoencoder there is {autoencoder.codes_hash[:12]}: encode the "
            "data set and train the prior again",
            stages=("latents", "prior"),
        )
