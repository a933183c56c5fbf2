"""Passes of the networks, shared by all who ask: images are gathered, drawn, and handed back.

Every pass has exactly `size` images of the same settings: fewer are filled up. An image is a function of its own seed,
index, class and settings, and of the size of its pass; so it has the same bytes whoever else asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.errors import UserError
from bld_core.prior.binary import BinaryModel
from cluster.studio.pair import Pair

T = TypeVar("T")
Tell = Callable[[Tensor, int, int, int], None]
"""Is told of some of the images of a request, the index of the first, the step, and the number of all steps."""
_FRAMES = 16
_QUIET_TIMES = 5


@dataclass(eq=False)
class Work:
    """The images of one request, and how far they are.

    Attributes:
        pair: that was served when it came, and makes all of them.
        config: how they are drawn.
        seed: of the noise.
        label: their class; -1 for none.
        index: int64 (n,): the index of each.
        known: what is given of the code of all, of one row; or None.
        watch: told images, the index of the first and the number of the step, in the thread of the networks.
        begun: how many have had their pass, or are in it.
        codes: of the passes that are over, float 0/1 (B, h, w, c).
        images: of the passes that are over, uint8 (B, H, W, channels).
        done: when all of them are.
    """

    pair: Pair
    config: SamplingConfig
    seed: int
    label: int
    index: Tensor
    known: Known | None = None
    watch: Tell | None = None
    begun: int = 0
    codes: list[Tensor] = field(default_factory=list[Tensor])
    images: list[Tensor] = field(default_factory=list[Tensor])
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def left(self) -> int:
        """Images that are yet to have their pass; none where nobody waits for them any more."""
        return 0 if self.done.done() else len(self.index) - self.begun

    def alike(self, other: Work) -> bool:
        """Whether the two can share a pass."""
        here, there = (self.pair, self.known is None), (other.pair, other.known is None)
        return here == there and self.config == other.config


Share = tuple[Work, slice]
"""A part of some work, by its rows."""


class Passes:
    """One thread that has the networks, and what waits for it.

    Args:
        size: images in one pass.
        wait: share of a pass's time for which nobody new must come before it begins without being full: answers go out
            and the next questions come in while the networks wait, so that clients do not fall into two groups that
            take turns, each with half a pass. It never waits for more than five times that.

    Attributes:
        seconds: that the last pass took.
        failure: what the thread has failed of, which is no fault of a request.
    """

    def __init__(self, size: int, wait: float) -> None:
        self.size, self.wait = size, wait
        self.seconds, self._step_seconds = 0.1, 0.01  # until a pass has been
        self.failure: Exception | None = None
        self._thread = ThreadPoolExecutor(1, "networks")
        self._waiting: list[Work] = []
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in the thread that has the networks, between two passes."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except UserError:
            raise
        except Exception as error:
            self.failure = error
            raise

    async def draw(self, work: Work) -> tuple[Tensor, Tensor]:
        """Have its passes, among others; its codes, float 0/1 (n, h, w, c), and images, uint8 (n, H, W, channels)."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        self._waiting.append(work)
        self._came.set()
        await work.done
        return torch.cat(work.codes), torch.cat(work.images)

    async def _work(self) -> None:
        """Pass after pass, first come, first served."""
        while True:
            await self._came.wait()
            await self._filled()
            shares = self._gather()
            if not shares:
                self._came.clear()
                continue
            try:
                await self.call(self._pass, shares)
                _hand_out(shares)
            except Exception as error:  # of all that are in it; whoever asks next may have better luck
                _hand_out(shares, error)
            del shares  # else they keep their pair, which another may have followed

    async def _filled(self) -> None:
        """Wait while more and more comes, and no other settings wait: those answered together ask again together."""
        alike = self._gatherable()
        if not alike:
            return
        quiet = self.wait * self._step_seconds * alike[0].pair.prior.model.steps(alike[0].config)
        ends = time.monotonic() + _QUIET_TIMES * quiet
        while (left := min(quiet, ends - time.monotonic())) > 0 and not self._enough():
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)
            if not self._came.is_set():
                break
        self._came.set()

    def _enough(self) -> bool:
        """Whether a pass is full, or keeps others waiting."""
        alike = self._gatherable()
        return sum(work.left for work in alike) >= self.size or len(alike) < len(self._waiting)

    def _gatherable(self) -> list[Work]:
        """What can share the next pass with the oldest."""
        self._waiting = [work for work in self._waiting if work.left]
        return [work for work in self._waiting if work.alike(self._waiting[0])]

    def _gather(self) -> list[Share]:
        """The rows of the next pass."""
        shares, room = list[Share](), self.size
        for work in self._gatherable():
            count = min(room, work.left)
            if count:
                shares.append((work, slice(work.begun, work.begun + count)))
                work.begun += count
                room -= count
        return shares

    def _pass(self, shares: list[Share]) -> None:
        """Draw the rows of a pass; in the thread of the networks."""
        began, first = time.monotonic(), shares[0][0]
        generator, config = first.pair.generator, first.config
        rows = [(work, n) for work, part in shares for n in range(part.start, part.stop)]
        rows += rows[-1:] * (self.size - len(rows))
        device, labels = generator.device, [work.label for work, _ in rows]
        samples = SampleSpec(
            torch.stack([work.index[n] for work, n in rows]).to(device),
            torch.tensor(labels, device=device) if generator.classes else None,
            [work.seed for work, _ in rows],
        )
        parts = [work.known for work, _ in rows if work.known is not None]
        known = Known(*map(torch.cat, zip(*parts, strict=True))) if parts else None
        of = first.pair.prior.model.steps(config)
        every, codes = math.ceil(of / _FRAMES), torch.empty(0)
        gradual = isinstance(first.pair.prior.model, BinaryModel)  # others give their last state alone
        for step, codes in enumerate(generator.states(samples, config, known)):
            if gradual and step < of and step % every == 0:
                self._tell(shares, lambda rows: generator.images(codes[rows], config), step, of)  # noqa: B023
        images, codes = generator.images(codes, config), codes.cpu()
        self._tell(shares, lambda rows: images[rows], of, of)
        self.seconds, begins = time.monotonic() - began, 0
        self._step_seconds = self.seconds / of
        for work, part in shares:
            ends = begins + part.stop - part.start
            work.codes.append(codes[begins:ends])
            work.images.append(images[begins:ends])
            begins = ends

    def _tell(self, shares: list[Share], images: Callable[[slice], Tensor], step: int, of: int) -> None:
        """Tell those who watch."""
        begins = 0
        for work, part in shares:
            ends = begins + part.stop - part.start
            if work.watch is not None:
                work.watch(images(slice(begins, ends)), part.start, step, of)
            begins = ends

    async def decode(self, pair: Pair, codes: Tensor, config: SamplingConfig) -> Tensor:
        """The images of codes, float 0/1 (n, h, w, c), in passes that are filled up like those of samples."""
        filled = torch.cat([codes, codes[-1:].expand(-len(codes) % self.size, -1, -1, -1)])
        parts = filled.to(pair.generator.device).split(self.size)
        return torch.cat([await self.call(pair.generator.images, part, config) for part in parts])[: len(codes)]


def _hand_out(shares: list[Share], failure: Exception | None = None) -> None:
    """Tell those who wait that all of their images are there, or why they will not be."""
    for work, rows in shares:
        if not work.done.done():
            if failure is not None:
                work.done.set_exception(failure)
            elif rows.stop == len(work.index):
                work.done.set_result(None)
