"""The engine: requests to images and codes, and these to answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import reprlib
from collections.abc import AsyncIterator, Generator
from typing import Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from bld_core.data.pictures import picture, png
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.generator import known_tokens
from bld_core.latents.bits import pack_bits, unpack_bits
from bld_core.noise import permutation
from cluster.studio.api import (
    BusyError,
    End,
    InpaintingsRequest,
    InterpolationsRequest,
    Model,
    OutpaintingsRequest,
    Picture,
    Pictures,
    Reconstruction,
    ReconstructionRequest,
    RequestError,
    SamplesRequest,
    Settings,
    Step,
    base64_of,
    read_base64,
    read_image,
    read_mask,
)
from cluster.studio.config import ServeConfig
from cluster.studio.pair import Pair
from cluster.studio.passes import Passes, Tell, Work

AnyRequest = SamplesRequest | InpaintingsRequest | OutpaintingsRequest | ReconstructionRequest | InterpolationsRequest
Answer = Pictures | Reconstruction


_SMALL = 128  # pixels, of the pictures of a step


class Studio(Protocol):
    """What answers requests: an engine, here or far away."""

    async def model(self) -> Model:
        """What is served now."""
        ...

    async def report(self) -> str:
        """The report of what is served, a page; "" where it has none."""
        ...

    async def answer(self, request: AnyRequest) -> Answer:
        """The answer to a request.

        Raises:
            RequestError: it cannot be answered.
            BusyError: not now.
        """
        ...

    def watch(self, request: SamplesRequest) -> AsyncIterator[Step | Pictures]:
        """The same, after each step that the samples take; the errors come before the first."""
        ...


class Engine:
    """A `Studio` in this process.

    Args:
        pair: what it serves; another one may be put in its place at any time.
        config: how much it gathers, and takes on.
    """

    def __init__(self, pair: Pair, config: ServeConfig) -> None:
        self.pair, self.config = pair, config
        self._passes = Passes(config.batch, config.wait)
        self._asked = 0  # images that are asked for and not yet answered

    @property
    def failure(self) -> Exception | None:
        """What a pass has failed of, which is no fault of a request: this engine may be broken."""
        return self._passes.failure

    async def model(self) -> Model:
        """What is served now."""
        return self.pair.model

    async def report(self) -> str:
        """Its report, a page; "" where it has none."""
        return self.pair.report

    async def answer(self, request: AnyRequest) -> Answer:
        """See `Studio`."""
        pair = self.pair
        match request:
            case ReconstructionRequest():
                with self._taken_on(1):
                    return await self._reconstruct(pair, request)
            case InterpolationsRequest():
                with self._taken_on(request.count):
                    return await self._interpolate(pair, request)
            case _:
                with self._taken_on(request.count):
                    return await self._draw(pair, request)

    async def watch(self, request: SamplesRequest) -> AsyncIterator[Step | Pictures]:
        """See `Studio`."""
        pair, loop = self.pair, asyncio.get_running_loop()
        told: asyncio.Queue[Step | None] = asyncio.Queue()

        def tell(images: Tensor, first: int, step: int, of: int) -> None:
            finer = max(1, images.shape[1] // _SMALL)
            shown = [base64_of(png(picture(image))) for image in images[:, ::finer, ::finer].contiguous()]
            event = Step(version=pair.model.version, step=step, of=of, first=first, images=shown)
            loop.call_soon_threadsafe(told.put_nowait, event)

        with self._taken_on(request.count):
            drawn = asyncio.create_task(self._draw(pair, request, tell))
            drawn.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (event := await told.get()) is not None:
                    yield event
                yield await drawn
            finally:
                drawn.cancel()

    @contextlib.contextmanager
    def _taken_on(self, count: int) -> Generator[None]:
        """Count the images of a request, from when it comes to when it is answered.

        Raises:
            BusyError: with them it would be too many.
        """
        if self._asked + count > self.config.queue:
            raise BusyError(math.ceil(self._asked / self.config.batch * self._passes.seconds))
        self._asked += count
        try:
            yield
        finally:
            self._asked -= count

    async def _draw(
        self, pair: Pair, request: SamplesRequest | InpaintingsRequest | OutpaintingsRequest, tell: Tell | None = None
    ) -> Pictures:
        """The images of a request."""
        label = _label(pair, request.label)
        index, known, given = torch.arange(request.count), None, None
        if not isinstance(request, SamplesRequest):
            given = image, mask = await asyncio.to_thread(_given, pair, request)
            known = await self._passes.call(pair.generator.known, image[None], mask[None])
            index <<= 32  # the number of a completion, as in `Generator.inpaint`
        config = _settled(pair, request, completing=given is not None)
        codes, images = await self._passes.draw(Work(pair, config, request.seed, label, index, known, tell))
        if given is not None:
            image, mask = given
            images = torch.where(mask[..., None], image, images)
        return await asyncio.to_thread(_pictures, pair, codes, images, request.seed)

    async def _reconstruct(self, pair: Pair, request: ReconstructionRequest) -> Reconstruction:
        """A code and its image."""
        config = _settled(pair, Settings())
        code = await self._code(pair, End(image=request.image, bits=request.bits), config)
        made = await self._decoded(pair, code[None], config)
        [shown] = made.images
        return Reconstruction(version=made.version, bits=shown.bits, png=shown.png)

    async def _interpolate(self, pair: Pair, request: InterpolationsRequest) -> Pictures:
        """The way from one code to another, by a fixed order of the bits that differ."""
        config = _settled(pair, request)
        start, end = await asyncio.gather(*(self._code(pair, each, config) for each in (request.start, request.end)))
        differ = (start != end).flatten().nonzero()[:, 0]
        order = differ[permutation(0, "interpolation", 0, len(differ))]
        codes = start.repeat(request.count, 1, 1, 1)
        for number, code in enumerate(codes.flatten(1)):
            changed = order[: round(len(order) * number / (request.count - 1))]
            code[changed] = end.flatten()[changed]
        return await self._decoded(pair, codes, config)

    async def _code(self, pair: Pair, end: End, config: SamplingConfig) -> Tensor:
        """The code of an image, of bits or of a seed, float 0/1 (h, w, c)."""
        model = pair.model
        if end.bits is not None:
            return _unpacked(pair, end.bits)
        if end.image is not None:
            image = await asyncio.to_thread(read_image, end.image, model.image_size, model.channels, "image")
            return (await self._passes.call(pair.generator.encode, image[None])).cpu()[0].float()
        assert end.seed is not None, "an end is one of the three"
        work = Work(pair, config, end.seed, _label(pair, end.label), torch.arange(1))
        return (await self._passes.draw(work))[0][0]

    async def _decoded(self, pair: Pair, codes: Tensor, config: SamplingConfig) -> Pictures:
        """Codes, float 0/1 (n, h, w, c), as pictures."""
        images = await self._passes.decode(pair, codes, config)
        return await asyncio.to_thread(_pictures, pair, codes, images, None)


def _settled(pair: Pair, settings: Settings, *, completing: bool = False) -> SamplingConfig:
    """How a request is to be drawn.

    Raises:
        RequestError: more steps than the model has, or it cannot complete images.
    """
    most = pair.model.sampling.max_steps
    if settings.steps is not None and settings.steps > most:
        raise RequestError("steps", str(settings.steps), f"at most {most}, the steps of the diffusion")
    config = pair.generator.settle(None, settings.sampling)
    pair.prior.model.steps(config, completing)
    return config


def _label(pair: Pair, label: int | str | None) -> int:
    """The number of a class; -1 for none.

    Raises:
        RequestError: there is none of this number or name.
    """
    if label is None:
        return -1
    names = pair.model.classes
    if not names:
        raise RequestError("label", reprlib.repr(label), "null", "this model knows no classes")
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    if isinstance(label, str) and label in names:
        return names.index(label)
    named = ", or a name of /v1/model" if any(names) else ""
    raise RequestError("label", reprlib.repr(label), f"from 0 to {len(names) - 1}{named}, or null for no class")


def _given(pair: Pair, request: InpaintingsRequest | OutpaintingsRequest) -> tuple[Tensor, Tensor]:
    """What is given of an image: uint8 (H, W, channels), and where, bool (H, W).

    Raises:
        RequestError: pictures, box or margins that do not fit.
    """
    size, channels = pair.model.image_size, pair.model.channels
    image = read_image(request.image, size, channels, "image")
    if isinstance(request, InpaintingsRequest):
        return image, read_mask(request.mask, request.box or [], size)
    margins = {name: getattr(request, name) for name in ("left", "top", "right", "bottom")}
    left, top, right, bottom = (size // 4 if margin is None else margin for margin in margins.values())
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : size - bottom, left : size - right] = True
    latent, none_left = pair.model.latent, left + right >= size or top + bottom >= size
    if none_left or not known_tokens(mask[None], latent.height, latent.width).any():
        patch = f"{size // latent.width} x {size // latent.height}"
        raise RequestError(
            "left, top, right, bottom",
            f"{left}, {top}, {right}, {bottom}",
            "smaller",
            f"leave a whole patch of {patch} pixels",
        )
    smaller = picture(image).resize((size - left - right, size - top - bottom), PIL.Image.Resampling.LANCZOS)
    canvas = torch.zeros_like(image)
    canvas[top : size - bottom, left : size - right] = torch.from_numpy(np.array(smaller)).view(
        smaller.height, smaller.width, channels
    )
    return canvas, mask


def _unpacked(pair: Pair, bits: str) -> Tensor:
    """Packed bits as a code, float 0/1 (h, w, c).

    Raises:
        RequestError: they are not as many as the model's codes have.
    """
    packed, latent = read_base64(bits, "bits"), pair.model.latent
    if len(packed) * 8 != pair.model.bits_per_image:
        raise RequestError(
            "bits", f"{len(packed)} bytes", f"{pair.model.bits_per_image // 8} bytes, row-major (h, w, c)"
        )
    row = torch.frombuffer(bytearray(packed), dtype=torch.uint8)[None]
    return unpack_bits(row, (latent.height, latent.width, latent.bits))[0].float()


def _pictures(pair: Pair, codes: Tensor, images: Tensor, seed: int | None) -> Pictures:
    """Codes and their images as an answer."""
    shown = [
        Picture(png=base64_of(png(picture(image))), bits=base64_of(bits), index=number, seed=seed)
        for number, (image, bits) in enumerate(zip(images, pack_bits(codes), strict=True))
    ]
    return Pictures(version=pair.model.version, images=shown)
