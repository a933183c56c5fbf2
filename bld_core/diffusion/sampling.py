"""The reverse process (Section 4.1): from fair coin flips to a code, or from a part of a code to the whole."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bld_core.diffusion.groups import draw_flips, joint_log_posterior
from bld_core.diffusion.process import (
    Denoiser,
    DiffusionProcess,
    calibrate,
    network_output,
    reverse_flip_probability,
    transition,
)
from bld_core.diffusion.schedule import NoiseSchedule
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.precision import Precision


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
        guidance_interval: the times t/T, above the first and up to the second, at which guidance works (Kynkaanniemi et
            al. 2024); outside it a step is one pass instead of two. Read where prior.model is binary.
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
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    final: Literal["sample", "mode"] = "sample"
    inpainting: Literal["auto", "replacement", "conditioned"] = "auto"
    resample: int = 1
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"`steps` is {self.steps}; it must be at least 1", self)
        if self.grid and (self.grid[-1] != 0 or any(t <= s for t, s in itertools.pairwise(self.grid))):
            raise UserError(f"`grid` is {self.grid}; it must decrease from T, the steps of the process, to 0", self)
        if self.resample < 0:
            raise UserError(f"`resample` is {self.resample}; it must be 0 (no jumps back) or more", self)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(
                f"`temperature` is {self.temperature}; it must be above 0 and finite (the paper uses 0.9)", self
            )
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"`guidance` is {self.guidance}; it must be 0 (none) or more, and finite", self)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise UserError(
                f"`guidance_interval` is {self.guidance_interval}; it is two times t/T in [0, 1], the first below the "
                "second: [0, 1] is all",
                self,
            )

    def guidance_at(self, time: float) -> float:
        """W at a time t/T: 0 outside the interval."""
        low, high = self.guidance_interval
        return self.guidance if low < time <= high else 0.0

    def make_grid(self, schedule: NoiseSchedule) -> list[int]:
        """The noise levels t that sampling visits, decreasing from T to 0.

        Raises:
            UserError: more steps than T, or a given grid that does not start at T.
        """
        if not self.grid:
            return schedule.grid(self.steps, self.spacing)
        if self.grid[0] != schedule.steps:
            raise UserError(
                f"`grid` starts at {self.grid[0]}; this prior was trained with T = {schedule.steps}, so it must start "
                f"at {schedule.steps}, or samples would not start from pure noise",
                self,
            )
        return self.grid


@dataclass(frozen=True)
class SampleSpec:
    """Which samples to draw. Each is a function of the seed and its own index, label and known tokens.

    Attributes:
        index: int64 (B,): the number of each sample; the samples are drawn on its device.
        labels: int64 (B,) class indices, -1 for none; or None.
        seed: of the noise, one for all samples or one for each.
    """

    index: Tensor
    labels: Tensor | None = None
    seed: int | Sequence[int] = 0

    def uniforms(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers in [0, 1) of a shape for each sample, (B, *shape)."""
        return uniform(self.seed, purpose, self.index, math.prod(shape)).view(-1, *shape)


class Known(NamedTuple):
    """The part of each code that is given.

    z: float 0/1 (B, N, C), clean bits; those of unknown tokens are never read.
    mask: bool (B, N), True where a token is known.
    """

    z: Tensor
    mask: Tensor


def guided_output(
    denoiser: Denoiser,
    z_t: Tensor,
    time: Tensor,
    labels: Tensor | None,
    guidance: float,
    known: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance: o = (1 + w) o_cond - w o_uncond, in one batched call; evidence is linear in the output.

    Both halves are told which tokens are known, bool (B, N); None tells nothing.
    """
    if labels is None or guidance == 0:
        return network_output(denoiser, z_t, time, labels, known)
    null = torch.full_like(labels, -1)
    masks = None if known is None else torch.cat([known, known])
    both = network_output(denoiser, torch.cat([z_t, z_t]), torch.cat([time, time]), torch.cat([labels, null]), masks)
    conditional, unconditional = both.float().chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


@torch.no_grad()
def reverse_process(
    denoiser: Denoiser,
    process: DiffusionProcess,
    shape: tuple[int, int],
    samples: SampleSpec,
    config: SamplingConfig,
    known: Known | None = None,
) -> Iterator[Tensor]:
    """The states z_T, ..., z_0 of the exact reverse process, one for each level of the grid; the last is the code.

        z_T ~ Bernoulli(1/2)
        for t > s along the grid T, ..., 0:
            e = evidence of the guided output at z_t, divided by tau
            r = sigmoid(calibrate(e, k_t))
            flip each bit of z_t with probability r A + (1 - r) B, giving z_s

    With groups the flips of each are drawn jointly, by r, and then r is 0 or 1: whether a bit is flipped.

    Known tokens are put into every state z_s, in one of two ways. Conditioned: clean, and the denoiser is told which
    they are. Replacement: as a draw from q(z_s | z_0); and then each step is taken again, `resample` times:

            draw z_t ~ q(z_t | z_s), and step from there to z_s as before

    Args:
        denoiser: network of the process, (z_BNC, t/T, labels) -> output; conditioned: (..., known mask).
        process: schedule, target and groups; temperature and guidance work on all that the network says.
        shape: (tokens, bits) of a code.
        samples: which to draw. Noise is keyed on (seed, index, level, jump): a sample does not depend on its batch.
        config: the grid and the settings of the reverse process.
        known: what is given of each code; a sample of which nothing is known is drawn as without it.

    Yields:
        Codes, float 0/1, (B, tokens, bits), on the device of the samples' index.

    Raises:
        UserError: before the first state: a grid that is none, or a prior that cannot be told what is known.
    """
    grid, k = config.make_grid(process.schedule), process.schedule.levels
    groups = (shape[0], shape[1] // process.group)
    conditioned = known is not None and config.inpainting == "conditioned"  # "auto" is the prior's to decide
    told = known.mask if known is not None and conditioned else None
    jumps = 0 if known is None or conditioned else config.resample

    def draw(purpose: str, probability: Tensor | float) -> Tensor:
        return (samples.uniforms(purpose, shape) < probability).float()

    def put_known(z: Tensor, s: int, jump: int = 0) -> Tensor:
        if known is None:
            return z
        clean = known.z.to(z)
        bits = clean if conditioned else draw(f"sampling known {s} {jump}", transition(clean, 1.0, k[s]))
        return torch.where(known.mask[..., None], bits, z)

    def step(z: Tensor, t: int, s: int, jump: int = 0) -> Tensor:
        # The posterior of z_0, then the exact reverse step.
        share = t / process.schedule.steps
        time, guidance = torch.full((len(z),), share, device=z.device), config.guidance_at(share)
        mode, key = s == 0 and config.final == "mode", f"{t}" + (f" jump {jump}" if jump else "")
        output = guided_output(denoiser, z, time, samples.labels, guidance, told).float() / config.temperature
        evidence = process.evidence(output, z, k[t])
        if evidence.residual is None:
            r = torch.sigmoid(calibrate(evidence.bits, k[t]))
        else:
            u = None if mode else samples.uniforms(f"sampling groups {key}", groups)
            r = draw_flips(joint_log_posterior(evidence, z, k[t]), u)
        flip_probability = reverse_flip_probability(r, k[s], k[t])
        flips = (flip_probability > 0.5).float() if mode else draw(f"sampling step {key}", flip_probability)
        return put_known((z - flips).abs(), s, jump)

    z = put_known(draw("sampling start", 0.5), grid[0])
    yield z
    for t, s in itertools.pairwise(grid):
        z = step(z, t, s)
        # Replacement: back to level t and down again, so that unknown tokens settle on the known ones.
        for jump in range(1, jumps + 1):
            assert known is not None, "only known tokens give a reason to jump back"
            again = step(draw(f"sampling jump {t} {jump}", transition(z, k[s], k[t])), t, s, jump)
            z = torch.where(known.mask.any(1)[:, None, None], again, z)
        yield z


def sample_codes(
    denoiser: Denoiser,
    process: DiffusionProcess,
    shape: tuple[int, int],
    samples: SampleSpec,
    config: SamplingConfig,
    known: Known | None = None,
) -> Tensor:
    """Draw codes: the last state of `reverse_process`, which says what the arguments and the errors are."""
    return deque(reverse_process(denoiser, process, shape, samples, config, known), maxlen=1)[0]
