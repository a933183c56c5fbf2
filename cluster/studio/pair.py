"""The pair that is served, and where it comes from: an experiment's folder, or the registry, whose champion changes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Protocol

import bld_core
from bld_core.errors import MissingError
from bld_core.generator import Generator
from bld_core.prior.binary import BinaryModel
from bld_core.storage import files
from bld_core.trained import TrainedPrior
from cluster.registry.registry import fetch_model, newest_version
from cluster.studio.api import Latent, Model, Sampling


@dataclass(frozen=True)
class Pair:
    """A trained pair, ready to draw.

    Attributes:
        generator: the networks.
        model: what is said of it.
        report: its report, a page; "" where there is none.
    """

    generator: Generator
    model: Model
    report: str

    @property
    def prior(self) -> TrainedPrior:
        """The prior."""
        assert self.generator.prior is not None, "`open_folder` has looked"
        return self.generator.prior


class Source(Protocol):
    """Where a pair comes from."""

    def newer(self, version: str) -> Pair | None:
        """The pair of now, opened; None where it is of this version."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """The finished pair of an experiment's folder; its version is the beginning of its prior's hash."""

    name: str
    folder: str
    device: str

    def newer(self, version: str) -> Pair | None:
        """The pair, the first time."""
        return None if version else open_folder(self.folder, self.name, "", self.device)


@dataclass(frozen=True)
class RegisteredSource:
    """A version in the registry, by number or by an alias that moves.

    Attributes:
        model: models:/<name>@<alias> or models:/<name>/<version>.
        uri: of the tracking server.
        device: of the networks.
    """

    model: str
    uri: str
    device: str

    def newer(self, version: str) -> Pair | None:
        """See `Source`; the errors are those of `fetch_model`."""
        name, newest = newest_version(self.model, self.uri)
        if newest == version:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return open_folder(fetch_model(f"models:/{name}/{newest}", folder, self.uri), name, newest, self.device)


def open_folder(folder: str, name: str, version: str, device: str) -> Pair:
    """Open the pair of a folder, an experiment's or a registered one.

    Raises:
        MissingError: stage 1 or 2 is not finished.
        UserError: the two do not belong together.
    """
    generator = bld_core.load(folder, device)
    prior, first = generator.prior, generator.autoencoder.record
    if prior is None:
        raise MissingError(f"{folder!r} has no finished prior: train it first", stages=("prior",))
    record, (h, w, c) = prior.record, first.code_shape
    page, figures = files.join(folder, "evaluation/report.html"), files.join(folder, "evaluation/report.json")
    report = files.read_bytes(page).decode() if files.exists(page) else ""
    steps = prior.model.steps(record.sampling)
    model = Model(
        name=name,
        version=version or record.hash[:12],
        hashes={"autoencoder": first.hash, "prior": record.hash},
        image_size=first.image_size,
        channels=first.channels,
        latent=Latent(height=h, width=w, bits=c),
        classes=[record.class_names[n] if n < len(record.class_names) else None for n in range(generator.classes)],
        conditional=generator.classes > 0,
        sampling=Sampling(
            steps=steps,
            temperature=record.sampling.temperature,
            guidance=record.sampling.guidance,
            max_steps=record.diffusion.steps if isinstance(prior.model, BinaryModel) else steps,
        ),
        bits_per_image=h * w * c,
        metrics=files.read_json(figures)["figures"] if files.exists(figures) else {},
        report="report" if report else None,
    )
    return Pair(generator, model, report)
