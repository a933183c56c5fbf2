"""What the studio is asked and answers: every message of its HTTP API, with its bounds.

Pictures travel as PNG (others may come as JPEG, WebP, BMP or GIF), codes as bits packed row-major (h, w, c), most
significant first, as numpy.packbits does it; both in base64.
"""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from bld_core.data.pictures import mask_of_box, read_picture
from bld_core.errors import UserError
from cluster.studio.config import MOST_IMAGES

MOST_COMPLETIONS = 16
_MOST_TEXT = 1 << 24  # characters: the body's bound is lower
_WHITE = 128  # and above
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # of Pillow's decoders, those that a browser has, too


class RequestError(UserError):
    """A request that cannot be answered: status 422, with what is wrong of which field.

    Attributes:
        field: its name; "" where it is none in particular.
        value: as short text.
        bound: what it must be.
        remedy: what to do, where the bound does not say it.
    """

    def __init__(self, field: str, value: str, bound: str, remedy: str = "", message: str = "") -> None:
        super().__init__(message or f"{field} is {value}; it must be {bound}" + (f": {remedy}" if remedy else ""))
        self.field, self.value, self.bound, self.remedy = field, value, bound, remedy

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, ...]]:
        return RequestError, (self.field, self.value, self.bound, self.remedy, str(self))  # from one process to another


class BusyError(UserError):
    """Too many wait already: status 503.

    Attributes:
        seconds: after which it is worth to ask again.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"as many images wait as may; ask again in {seconds} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[BusyError], tuple[int]]:
        return BusyError, (self.seconds,)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON and pandas make floats of whole numbers
Seed = Annotated[Whole, Field(ge=0, lt=1 << 53, description="of the noise, below 2^53: browsers write these exactly")]
Label = Annotated[Whole | str | None, Field(description="the number or the name of a class; null asks for none")]
Image = Annotated[str, Field(max_length=_MOST_TEXT, description="a picture of the model's size, in base64")]
Bits = Annotated[str, Field(max_length=_MOST_TEXT, description="the packed bits of a code, in base64")]
Pixels = Annotated[Whole | None, Field(ge=0, le=1 << 16, description="a quarter of the side where it is left out")]


class Request(BaseModel):
    """Strict: no unknown fields, no text for numbers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Settings(Request):
    """How codes are drawn; what is left out is as stored with the prior."""

    steps: Whole | None = Field(default=None, ge=1, description="reverse steps, at most those of the model")
    temperature: float | None = Field(
        default=None, gt=0, le=100, allow_inf_nan=False, description="below 1 is less varied"
    )
    guidance: float | None = Field(
        default=None, ge=0, le=100, allow_inf_nan=False, description="towards the class; 0 is none"
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """Those that are given."""
        return self.model_dump(include={"steps", "temperature", "guidance"}, exclude_none=True)


class Draw(Settings):
    """What is drawn: an image is a function of its own seed and index, its class and the settings alone."""

    label: Label = None
    seed: Seed = 0


class SamplesRequest(Draw):
    """New images."""

    count: Whole = Field(default=1, ge=1, le=MOST_IMAGES)


class InpaintingsRequest(Draw):
    """Completions of an image of which a part is made anew: that of a mask, or of a box."""

    image: Image
    mask: Image | None = Field(default=None, description="white is known, black is made anew")
    box: list[Whole] | None = Field(
        default=None, min_length=4, max_length=4, description="left, top, right, bottom in pixels"
    )
    count: Whole = Field(default=1, ge=1, le=MOST_COMPLETIONS)

    @model_validator(mode="after")
    def _one_part(self) -> Self:
        if (self.mask is None) == (self.box is None):
            raise RequestError(
                "mask", "missing" if self.mask is None else "given, and so is box", "given, or box, not both"
            )
        return self


class OutpaintingsRequest(Draw):
    """The image made smaller, with new surroundings: the margins, in pixels of the result."""

    image: Image
    left: Pixels = None
    top: Pixels = None
    right: Pixels = None
    bottom: Pixels = None
    count: Whole = Field(default=1, ge=1, le=MOST_COMPLETIONS)


class ReconstructionRequest(Request):
    """What is left of an image behind its bits; or what bits mean."""

    image: Image | None = None
    bits: Bits | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.image is None) == (self.bits is None):
            raise RequestError(
                "image", "missing" if self.image is None else "given, and bits", "given, or bits, not both"
            )
        return self


class End(Request):
    """One end of an interpolation: an image, bits, or the sample of a seed."""

    image: Image | None = None
    bits: Bits | None = None
    seed: Seed | None = None
    label: Label = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("image", "bits", "seed") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError("an end", " and ".join(given) or "empty", "one of image, bits and seed")
        return self


class InterpolationsRequest(Settings):
    """Images between two, through the bits: a share of those that differ changes each time."""

    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)

    start: End = Field(alias="from")
    end: End = Field(alias="to")
    count: Whole = Field(default=8, ge=2, le=MOST_IMAGES, description="images, the two ends among them")


class Picture(BaseModel):
    """One image of an answer."""

    png: str
    bits: str
    index: int
    seed: int | None = None


class Pictures(BaseModel):
    """Images, and the version that made them."""

    version: str
    images: list[Picture]


class Reconstruction(BaseModel):
    """A code and its image."""

    version: str
    bits: str
    png: str


class Step(BaseModel):
    """A step of the reverse process: what the codes of images `first`, `first` + 1, ... say now, as small pictures."""

    version: str
    step: int
    of: int
    first: int
    images: list[str]


class Latent(BaseModel):
    """The shape of a code."""

    height: int
    width: int
    bits: int


class Sampling(BaseModel):
    """How samples are drawn unless a request says otherwise, and the most steps that it may ask for."""

    steps: int
    temperature: float
    guidance: float
    max_steps: int


class Model(BaseModel):
    """What is served."""

    name: str
    version: str
    hashes: dict[str, str]
    image_size: int
    channels: int
    latent: Latent
    classes: list[str | None]
    conditional: bool
    sampling: Sampling
    bits_per_image: int
    metrics: dict[str, float]
    report: str | None


class Fault(BaseModel):
    """What is wrong with a request."""

    message: str
    field: str = ""
    value: str = ""
    bound: str = ""
    remedy: str = ""


class Failure(BaseModel):
    """The answer to a request that cannot be answered."""

    error: Fault


def read_image(text: str, size: int, channels: int, field: str) -> Tensor:
    """A picture in base64 as an image, uint8 (size, size, channels). Its size is looked at before it is decoded.

    Raises:
        RequestError: it is none, or has another size.
    """
    data, bound = read_base64(text, field), f"a picture of {size} x {size} pixels, as {' or '.join(_FORMATS)}"
    try:
        return read_picture(data, size, channels, field, _FORMATS)
    except UserError as error:
        raise RequestError(field, f"{len(data)} bytes", bound, message=str(error)) from error


def read_mask(mask: str | None, box: Sequence[int], size: int) -> Tensor:
    """What is known of an image: where a picture in base64 is white, or outside of a box; bool (size, size).

    Raises:
        RequestError: the picture is none or of another size, or the box does not lie within the image.
    """
    if mask:
        return read_image(mask, size, 1, "mask")[..., 0] >= _WHITE
    try:
        return mask_of_box(box, size, "box")
    except UserError as error:
        raise RequestError("box", str(list(box)), f"within 0..{size}", message=str(error)) from error


def read_base64(text: str, field: str) -> bytes:
    """Text in base64 as bytes.

    Raises:
        RequestError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, reprlib.repr(text), "base64 text", str(error)) from error


def base64_of(data: bytes | Tensor) -> str:
    """Bytes, or a tensor of them, in base64."""
    return base64.b64encode(data.numpy().tobytes() if isinstance(data, torch.Tensor) else data).decode()
