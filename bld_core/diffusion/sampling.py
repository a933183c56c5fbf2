"""The reverse process (Section 4.1): from fair coin flips to a code, or from a part of a code to the whole."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bld_core.diffusion.process import (
    Denoiser,
    Target,
    calibrate,
    check_grid,
    evidence_network,
    network_output,
    reverse_flip_probability,
    transition,
)
from bld_core.diffusion.schedule import NoiseSchedule
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.training.loop import Precision


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from a trained prior (Section 4.1).

    Where prior.model is not binary, temperature and guidance work on the logits of the bits. "absorbing" has as many
    noise levels as tokens, T = N: more steps than that are taken as N, and `final` must be "sample". "autoregressive"
    always takes one step a token: it does not read steps and spacing, and takes no grid.

    Args:
        steps: number of reverse steps, 1..T; each is one pass of the network.
        spacing: equal steps of the signal "k", or of "t" as the paper's.
        grid: the noise levels to visit, decreasing from T to 0, in place of steps and spacing; empty leaves it to them.
        temperature: tau, divides the evidence logits; below 1 is surer and less varied (the paper uses 0.9).
        guidance: w, pushes samples towards their class; 0 is none (the paper uses 2 on ImageNet).
        final: draw the last step from its distribution ("sample"), or take the likelier value ("mode").
        inpainting: how known tokens steer the rest: "conditioned" keeps them clean and marks them to the prior, which
            is exact and needs one trained with prior.known_share; "replacement" puts them in at each noise level,
            which is biased but works with any prior; "auto" is conditioned where the prior allows it.
        resample: how often replacement jumps one step back and takes it again, which lowers its bias; each time is one
            more pass of the network a step.
        precision: of the passes of prior and decoder; "bfloat16" is faster where the machine computes in it. The steps
            between the passes are float32.
        compile: compile the networks, on a GPU with CUDA graphs: the first images of each batch size take a minute.
    """

    steps: int = 16
    spacing: Literal["k", "t"] = "k"
    grid: list[int] = field(default_factory=list)
    temperature: float = 0.9
    guidance: float = 0.0
    final: Literal["sample", "mode"] = "sample"
    inpainting: Literal["auto", "replacement", "conditioned"] = "auto"
    resample: int = 1
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampling.steps is {self.steps}; it must be at least 1")
        if self.grid and (self.grid[-1] != 0 or any(t <= s for t, s in itertools.pairwise(self.grid))):
            raise UserError(f"sampling.grid is {self.grid}; it must decrease from T (diffusion.steps) to 0")
        if self.resample < 0:
            raise UserError(f"sampling.resample is {self.resample}; it must be 0 (no jumps back) or more")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(
                f"sampling.temperature is {self.temperature}; it must be above 0 and finite (the paper uses 0.9)"
            )
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"sampling.guidance is {self.guidance}; it must be 0 (none) or more, and finite")

    def times(self, schedule: NoiseSchedule) -> list[int]:
        """The steps t that sampling visits, decreasing from T to 0.

        Raises:
            UserError: more steps than T, or a given grid that does not start at T.
        """
        if not self.grid:
            return schedule.grid(self.steps, self.spacing)
        if self.grid[0] != schedule.steps:
            raise UserError(
                f"sampling.grid starts at {self.grid[0]}; this prior was trained with T = {schedule.steps}, so it must "
                f"start at {schedule.steps}, or samples would not start from pure noise"
            )
        return self.grid


class Known(NamedTuple):
    """The part of each code that is given.

    z: float 0/1 (B, N, C), clean bits; those of unknown tokens are never looked at.
    mask: bool (B, N), True where a token is known.
    """

    z: Tensor
    mask: Tensor


def guided_evidence(
    denoiser: Denoiser,
    z_t: Tensor,
    time: Tensor,
    labels: Tensor | None,
    guidance: float,
    known: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance on evidence logits: e = (1 + w) e_cond - w e_uncond, in one batched call.

    `known` marks known tokens, bool (B, N), to both halves; None marks nothing.
    """
    if labels is None or guidance == 0:
        return network_output(denoiser, z_t, time, labels, known)
    null = torch.full_like(labels, -1)
    marks = None if known is None else torch.cat([known, known])
    both = network_output(denoiser, torch.cat([z_t, z_t]), torch.cat([time, time]), torch.cat([labels, null]), marks)
    conditional, unconditional = both.float().chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


@torch.no_grad()
def reverse_process(
    denoiser: Denoiser,
    shape: tuple[int, int],
    labels: Tensor | None,
    index: Tensor,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    seed: int,
    target: Target = "flip",
    known: Known | None = None,
) -> Iterator[Tensor]:
    """The states z_T, ..., z_0 of the exact reverse process, one for each t of the grid; the last is the code.

        z_T ~ Bernoulli(1/2)
        for t > s along the grid T, ..., 0:
            e = guided evidence of z_t
            r = sigmoid(calibrate(e / tau, k_t))
            flip each bit of z_t with probability r A + (1 - r) B, giving z_s

    Where tokens are known, they are put into every state z_s: clean and marked to the denoiser (conditioned), or as
    a draw from q(z_s | z_0) (replacement). With replacement each step is then taken again R times:

            draw z_t ~ q(z_t | z_s), and step from there to z_s as before

    Args:
        denoiser: network of `target`, (z_BNC, t/T, labels) -> logits; conditioned: (..., known mask).
        shape: (tokens, bits) of a code.
        labels: int64 (B,) class indices, -1 for none; or None.
        index: int64 (B,): sample i is keyed on (seed, index[i], step, jump) and does not depend on its batch.
        schedule: of the noise.
        config: the grid and the settings of the reverse process.
        seed: of the noise.
        target: what the network predicts; temperature and guidance work on the evidence in any case.
        known: what is given of each code; a sample of which nothing is known is drawn as without it.

    Yields:
        Codes, float 0/1, (B, tokens, bits), on the device of `index`.

    Raises:
        UserError: before the first state: a grid that is none, or one that skips steps for target z_prev; or a prior
            that cannot be told what is known.
    """
    grid = config.times(schedule)
    check_grid(grid, schedule, target)
    network = evidence_network(denoiser, schedule, target)
    k = schedule.k.tolist()
    conditioned = known is not None and config.inpainting == "conditioned"  # "auto" is the prior's to decide
    jumps = 0 if known is None or conditioned else config.resample

    def draw(purpose: str, probability: Tensor | float) -> Tensor:
        return (uniform(seed, purpose, index, math.prod(shape)).view(-1, *shape) < probability).float()

    def put_known(z: Tensor, s: int, jump: int = 0) -> Tensor:
        if known is None:
            return z
        clean = known.z.to(z)
        bits = clean if conditioned else draw(f"sampling known {s} {jump}", transition(clean, 1.0, k[s]))
        return torch.where(known.mask[..., None], bits, z)

    def step(z: Tensor, t: int, s: int, jump: int = 0) -> Tensor:
        time = torch.full((len(z),), t / schedule.steps, device=z.device)
        marks = known.mask if known is not None and conditioned else None
        evidence = guided_evidence(network, z, time, labels, config.guidance, marks).float()
        r = torch.sigmoid(calibrate(evidence / config.temperature, k[t]))
        flip_probability = reverse_flip_probability(r, k[s], k[t])
        if s == 0 and config.final == "mode":
            flips = (flip_probability > 0.5).float()
        else:
            flips = draw(f"sampling step {t}" + (f" jump {jump}" if jump else ""), flip_probability)
        return put_known((z - flips).abs(), s, jump)

    z = put_known(draw("sampling start", 0.5), grid[0])
    yield z
    for t, s in itertools.pairwise(grid):
        z = step(z, t, s)
        for jump in range(1, jumps + 1):
            assert known is not None, "only known tokens give a reason to jump back"
            again = step(draw(f"sampling jump {t} {jump}", transition(z, k[s], k[t])), t, s, jump)
            z = torch.where(known.mask.any(1)[:, None, None], again, z)
        yield z


def sample_codes(
    denoiser: Denoiser,
    shape: tuple[int, int],
    labels: Tensor | None,
    index: Tensor,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    seed: int,
    target: Target = "flip",
    known: Known | None = None,
) -> Tensor:
    """Draw codes: the last state of `reverse_process`, which says what the arguments and the errors are."""
    states = reverse_process(denoiser, shape, labels, index, schedule, config, seed, target, known)
    return deque(states, maxlen=1)[0]
