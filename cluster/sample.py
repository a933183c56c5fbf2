"""Grids of samples: PNG to look at, npz to measure."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

import bld_core
from bld_core import files
from bld_core.checkpoint import read_model_config
from bld_core.generator import AUTOENCODER, PRIOR
from bld_core.models import trained_model
from bld_core.pictures import grid, png
from cluster.experiment import Experiment
from cluster.runtime import map_on_actors
from cluster.stages import open_stage

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Draw:
    """Piece of work: draw the samples `first_index`, `first_index` + 1, ..., one for each label."""

    labels: list[int] | None
    count: int
    first_index: int
    seed: int


class Sampler:
    """An actor that holds the trained pair."""

    def __init__(self, experiment: Experiment) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.generator = bld_core.load(experiment.folder, experiment.cluster.device)

    def draw(self, piece: Draw) -> Tensor:
        """The images, uint8 (count, H, W, channels)."""
        settings = asdict(self.experiment.sampling)
        return self.generator.sample(
            piece.count, labels=piece.labels, seed=piece.seed, first_index=piece.first_index, **settings
        )


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """One grid of samples.

    Args:
        classes: class of each column, -1 for none; empty takes every class, or ten columns where there are none.
        rows: rows of the grid.
        seed: of the noise; another seed gives other images.
        file: name of the grid's folder; empty makes one from the settings.
    """

    classes: list[int] = field(default_factory=list)
    rows: int = 8
    seed: int = 0
    file: str = ""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"grid.rows is {self.rows}; it must be at least 1")
        if "/" in self.file or self.file.startswith("."):
            raise ValueError(f"grid.file is {self.file!r}; it must be a folder name without slashes or a leading dot")


def draw_grid(experiment: Experiment, settings: GridConfig, fresh: bool = False) -> str:
    """Finished experiment -> <folder>/samples/<file>/: grid.png to look at, samples.npz to measure.

    The npz holds arr_0, uint8 images (N, H, W, channels), and arr_1, their classes.

    Args:
        experiment: its folder and its sampling settings.
        settings: what the grid shows.
        fresh: draw again even if the same grid is there.

    Returns:
        The path of grid.png.

    Raises:
        FileNotFoundError: a stage is not finished.
        ValueError: an unknown class.
    """
    prior = read_model_config(files.join(experiment.folder, PRIOR))
    known = prior["prior"]["classes"]
    columns = settings.classes or list(range(known)) or [-1] * 10
    sampling = experiment.sampling
    shown = files.sha256(repr((columns, settings.rows, sampling)).encode())[:6]  # grids never replace one another
    steps = trained_model(prior, experiment.code_shape).steps(sampling)
    name = settings.file or (
        f"seed{settings.seed}-steps{steps}-tau{sampling.temperature:g}-w{sampling.guidance:g}-{shown}"
    )
    fingerprint = {
        "autoencoder_hash": read_model_config(files.join(experiment.folder, AUTOENCODER))["hash"],
        "prior_hash": prior["hash"],
        "prior_run": prior["run"],
        **experiment.fingerprint("sampling"),
        **asdict(settings),
        "classes": columns,
    }
    stage_name = f"samples/{name}"
    with open_stage(experiment, stage_name, fingerprint, "samples.npz", fresh=fresh, on_change="redo") as stage:
        picture_url = files.join(stage.folder, "grid.png")
        if not stage.done:
            labels = columns * settings.rows
            pieces: list[Draw] = []
            for start in range(0, len(labels), _IMAGES_AT_ONCE):
                some = labels[start : start + _IMAGES_AT_ONCE]
                pieces.append(Draw(some, len(some), start, settings.seed))
            images = torch.cat(list(map_on_actors(Sampler, (experiment,), "draw", pieces, experiment.cluster, "draw")))
            picture = grid(images, len(columns))
            stage.run.picture(picture, "grid.png")
            files.write_bytes(picture_url, png(picture))
            npz = io.BytesIO()
            np.savez(npz, arr_0=images.numpy(), arr_1=np.asarray(labels))
            files.write_bytes(files.join(stage.folder, "samples.npz"), npz.getvalue())
        return picture_url
