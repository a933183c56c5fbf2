"""Grids of samples: PNG to look at, npz to measure."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL.Image import Image

from bld_core.data.pictures import grid, png
from bld_core.errors import UserError
from bld_core.prior.binary import BinaryModel
from bld_core.storage import files
from cluster.config.artifacts import open_pair
from cluster.config.experiment import Experiment
from cluster.lineage import lineage
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import Draw, DrawProcess, Sampler, draw_pieces
from cluster.stages import open_stage

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """One grid of samples.

    Args:
        classes: class of each column, by number or name, -1 for none; empty takes every class, or ten columns where
            there are none.
        rows: rows of the grid.
        seed: of the noise; another seed gives other images.
        process: also make process.png (Fig. 3): a row for each sample of the first row, that many states of its way
            from noise to image; 0 makes none.
    """

    classes: list[int | str] = field(default_factory=list)
    rows: int = 8
    seed: int = 0
    process: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"grid.rows is {self.rows}; it must be at least 1")
        if self.process < 0 or self.process == 1:
            raise UserError(f"grid.process is {self.process}; it must be 0 (no such picture), or at least 2 states")


def draw_grid(experiment: Experiment, settings: GridConfig, fresh: bool = False) -> str:
    """Finished experiment -> a folder of its samples/: grid.png to look at, samples.npz to measure, maybe process.png.

    The npz holds arr_0, uint8 images (N, H, W, channels), and arr_1, their classes.

    Args:
        experiment: its folder and its sampling settings.
        settings: what the grid shows.
        fresh: draw again even if the same grid is there.

    Returns:
        The path of grid.png.

    Raises:
        MissingError: a stage is not finished.
        UserError: an unknown class, or the process of a prior that is no binary diffusion.
    """
    found = open_pair(experiment)
    assert found.prior is not None, "`open_pair` opens both"
    columns = [*map(found.prior.label, settings.classes)] or list(range(found.classes)) or [-1] * 10
    sampling = experiment.sampling
    shown = files.sha256(repr((columns, settings.rows, sampling)).encode())[:6]  # grids never replace one another
    model = found.model
    if settings.process and not isinstance(model, BinaryModel):
        raise UserError(
            f"grid.process is {settings.process}, but prior.model is {found.prior.prior.model}: only binary diffusion "
            "goes from noise to image; set grid.process to 0"
        )
    steps = model.steps(sampling)
    name = f"seed{settings.seed}-steps{steps}-tau{sampling.temperature:g}-w{sampling.guidance:g}-{shown}"
    fingerprint = {
        **found.identity,
        **experiment.fingerprint("sampling"),
        **asdict(settings),
        "classes": columns,
    }
    stage_name = f"samples/{name}"
    with open_stage(experiment, stage_name, fingerprint, "samples.npz", fresh=fresh, on_change="redo") as stage:
        picture_url = stage.url("grid.png")
        if not stage.done:
            stage.run.tags(lineage(found.autoencoder, found.prior))
            labels = columns * settings.rows
            pieces: list[Draw | DrawProcess] = [
                *draw_pieces(sampling, labels, len(labels), _IMAGES_AT_ONCE, settings.seed)
            ]
            if settings.process:
                pieces.append(DrawProcess(sampling, columns, settings.process, settings.seed))
            made = list(map_on_actors(Sampler, (experiment,), "draw", pieces, experiment.cluster, "draw"))
            pictures: dict[str, Image] = {}
            if settings.process:
                states = made.pop()
                pictures["process.png"] = grid(states.flatten(0, 1), states.shape[1])
            images = torch.cat(made)
            pictures["grid.png"] = grid(images, len(columns), found.prior.headings(columns))
            for file, picture in pictures.items():
                stage.run.picture(picture, file)
                stage.write(file, png(picture))
            npz = io.BytesIO()
            np.savez(npz, arr_0=images.numpy(), arr_1=np.asarray(labels))
            stage.write("samples.npz", npz.getvalue())
        return picture_url
