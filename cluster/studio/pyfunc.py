"""What `mlflow models serve` runs for a registered pair: samples by class and inpaintings, as PNG, over HTTP.

A request is a table with a row for each thing that is wanted, the answer a list with the pictures of each row:

    {"dataframe_records": [{"label": 3, "count": 2}, {"image": "<base64>", "box": [16, 0, 32, 32]}]}
    {"predictions": [{"images": ["<base64>", "<base64>"]}, {"images": ["<base64>"]}]}
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Generator
from typing import Any, Self

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import bld_core
from bld_core import generator
from bld_core.data.pictures import picture, png
from bld_core.errors import UserError
from cluster.studio.api import Whole, base64_of, read_image, read_mask

_MOST_IMAGES = 256


class Wanted(BaseModel):
    """One row of a request. A field that is left out, or null, has its default; descriptions end "it must be".

    Args:
        label: class of the images, by number or name; -1 asks for none.
        seed: of the noise; the images are a function of the row alone.
        count: how many images.
        steps: number of reverse steps; this and the next two are by default those stored with the prior.
        temperature: tau.
        guidance: w.
        image: base64 of a picture to complete; empty draws new images.
        mask: base64 of a picture of its size: white is known, black is made anew.
        box: in place of a mask, left, top, right, bottom in pixels of the part that is made anew.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    label: Whole | str = Field(-1, description="a whole number or a name")
    seed: Whole = Field(0, description="a whole number")
    count: Whole = Field(1, ge=1, description="a whole number of at least 1")
    steps: Whole | None = Field(None, description="a whole number")
    temperature: float | None = Field(None, description="a number")
    guidance: float | None = Field(None, description="a number")
    image: str = Field("", description="base64 text")
    mask: str = Field("", description="base64 text")
    box: tuple[Whole, ...] = Field((), strict=False, description="a list of whole numbers")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if bool(self.image) != bool(self.mask or self.box):
            raise UserError("an image to complete comes with a mask or a box, and these with an image")
        if self.mask and self.box:
            raise UserError(f"mask and box {list(self.box)} both say what is made anew; leave one of them out")
        if self.box and len(self.box) != 4:
            raise UserError(f"box is {list(self.box)}; it must be [left, top, right, bottom] in pixels")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings that are given."""
        return self.model_dump(include={"steps", "temperature", "guidance"}, exclude_none=True)


def read_row(row: dict[str, Any]) -> Wanted:
    """A row of a request, checked.

    Raises:
        UserError: an unknown field, or a value of another type or out of bounds.
    """
    known = Wanted.model_fields
    if unknown := [name for name in row if name not in known]:
        raise UserError(f"unknown field {', '.join(unknown)}; a row may have {', '.join(known)}")
    given = {name: value for name, value in row.items() if not (value is None or value != value)}  # NaN: left out
    try:
        return Wanted.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UserError(first["msg"].removeprefix("Value error, ")) from error  # of `_agree`
        name = str(first["loc"][0])
        raise UserError(f"{name} is {reprlib.repr(given[name])}; it must be {known[name].description}") from error


class Served:
    """A registered pair as MLflow calls it."""

    def __init__(self, pair: generator.Generator) -> None:
        self.pair = pair

    def predict(self, frame: object) -> list[dict[str, list[str]]]:
        """The pictures of every row, PNG in base64.

        Raises:
            MlflowException: a bad request, which its sender is told as status 400 with the row and the reason.
        """
        if not isinstance(frame, pd.DataFrame):  # what MLflow makes of its other forms
            raise MlflowException.invalid_parameter_value(
                "the request is not a table: send dataframe_records, a list with an object for each row, or "
                'dataframe_split, for example {"dataframe_records": [{"label": 3}]}'
            )
        wanted: list[Wanted] = []
        for number, row in enumerate(frame.to_dict("records")):
            with _blame(number):
                wanted.append(read_row({str(name): value for name, value in row.items()}))
                if (total := sum(row.count for row in wanted)) > _MOST_IMAGES:
                    raise UserError(f"{total} images asked for; one request gives at most {_MOST_IMAGES}")
        answers: list[dict[str, list[str]]] = []
        for number, row in enumerate(wanted):
            with _blame(number):
                images = self._complete(row) if row.image else self._draw(row)
            answers.append({"images": [base64_of(png(picture(image))) for image in images]})
        return answers

    def _draw(self, row: Wanted) -> torch.Tensor:
        return self.pair.sample(labels=[self._label(row)] * row.count, seed=row.seed, **row.sampling)

    def _label(self, row: Wanted) -> int:
        prior = self.pair.prior
        return -1 if prior is None else prior.record.label(row.label)  # without one, nothing is drawn

    def _complete(self, row: Wanted) -> torch.Tensor:
        record = self.pair.autoencoder.record
        size = record.image_size
        image, mask = read_image(row.image, size, record.channels, "image"), read_mask(row.mask, row.box, size)
        labels = None if row.label == -1 else [self._label(row)]
        made = self.pair.inpaint(image[None], mask[None], count=row.count, labels=labels, seed=row.seed, **row.sampling)
        return made[0]


@contextlib.contextmanager
def _blame(number: int) -> Generator[None]:
    """A UserError becomes status 400, which names the row."""
    try:
        yield
    except UserError as error:
        raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from error


def load_served(path: str) -> Served:
    """Open the folder of a registered version; on a GPU, where there is one."""
    return Served(bld_core.load(path, "cuda" if torch.cuda.is_available() else "cpu"))
