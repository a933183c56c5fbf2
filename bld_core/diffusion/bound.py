"""The likelihood bound on held-out codes, in bits per latent bit: one estimator for the chains of every prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bld_core.diffusion.loss import Step, loss_terms
from bld_core.diffusion.process import CodeBatch, Denoiser, DiffusionProcess
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.precision import ieee_float32

_GOLDEN_RATIO = 0.6180339887498949  # its multiples fill [0, 1) evenly, however many are taken
_BATCH_SIZE = 256


@dataclass(frozen=True)
class Bound:
    """A likelihood bound in bits per latent bit; lower is better, and a prior that knows nothing pays 1.0.

    Attributes:
        codes: how many it is the mean of.
        bits_per_bit: the bound.
        standard_error: of the bound; it covers the choice of codes and of noise.
        profile: what each step of the chain adds to the bound, the step that ends in the code first. Over all T steps,
            profile[t - 1] is the mean L_vlb(t) in bits a bit. The entries sum to the bound, to float64 rounding. Each
            is a mean over the codes that met its step alone: where the steps are many, add up neighbours.
        per_code: what each code pays, in bits a bit, in their order: for differences between two networks, which meet
            the same codes and noise.
    """

    codes: int
    bits_per_bit: float
    standard_error: float
    profile: tuple[float, ...]
    per_code: tuple[float, ...] = ()


def merge_bounds(parts: Sequence[Bound]) -> Bound:
    """The bound of a set of codes from the bounds of its parts; the codes of a part had their numbers in the set."""
    codes = sum(part.codes for part in parts)
    mean = sum(part.codes * part.bits_per_bit for part in parts) / codes
    squares = sum(
        part.codes * ((part.codes - 1) * part.standard_error**2 + (part.bits_per_bit - mean) ** 2) for part in parts
    )
    profiles = torch.tensor([part.profile for part in parts], dtype=torch.float64)
    weights = torch.tensor([part.codes / codes for part in parts], dtype=torch.float64)
    error = math.sqrt(squares / (codes - 1) / codes)
    per_code = tuple(bits for part in parts for bits in part.per_code)
    return Bound(codes, mean, error, tuple((weights @ profiles).tolist()), per_code)


def likelihood_bound(
    denoiser: Denoiser,
    process: DiffusionProcess,
    codes: CodeBatch,
    grid: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = _BATCH_SIZE,
) -> Bound:
    """The bound of held-out codes under the reverse chain of a grid: sum of E[L_vlb] / ln 2 over its steps t -> s.

    `estimate_bound` says how the sum is estimated. The flips are keyed on (seed, number of the code, repeat): two
    networks are compared on the same noise.

    Args:
        denoiser: network of the process.
        process: schedule, target and groups.
        codes: held-out, of any dtype; parts of a set keep their numbers in the set: see `merge_bounds`.
        grid: the noise levels that the chain visits, decreasing from T to 0, as `schedule.grid` gives them; None: all.
        seed: of the flips.
        batch_size: codes in one forward pass; changes nothing but memory.

    Raises:
        UserError: fewer than two codes, or a grid that is none.
    """
    steps = process.schedule.steps
    grid = range(steps, -1, -1) if grid is None else grid
    levels = torch.tensor(list(reversed(grid)), device=codes.z_0.device)
    if len(levels) < 2 or levels[0] != 0 or levels[-1] != steps or bool((levels.diff() <= 0).any()):
        raise UserError(f"the grid is {list(grid)}; it must decrease from T = {steps} to 0")

    def cost(part: CodeBatch, n: Tensor, repeat: int) -> Tensor:
        z = part.z_0
        u = uniform(seed, f"bound flips {repeat}", part.index, math.prod(z.shape[1:])).view(z.shape)
        return loss_terms(denoiser, process, part, Step(levels[n + 1], levels[n], u))[1]

    return estimate_bound(cost, codes, len(levels) - 1, batch_size=batch_size)


def estimate_bound(
    cost: Callable[[CodeBatch, Tensor, int], Tensor],
    codes: CodeBatch,
    steps: int,
    repeats: int = 8,
    batch_size: int = _BATCH_SIZE,
) -> Bound:
    """The bound of any chain, of whatever prior: the sum of what its steps cost, by stratified sampling of the steps.

    Each code meets `repeats` of the steps, spread evenly over the chain, and the codes together are spread evenly, too.

    Args:
        cost: (codes, n, repeat) -> (B,) nats a bit, what each code pays for its step n, int64 (B,). Step n = 0 is the
            one that ends in the code. Noise is keyed on the number of the code and the repeat.
        codes: held-out, of any dtype; `cost` gets them as float. The steps that a code meets are keyed on its number.
        steps: of the chain.
        repeats: steps that a code meets; one is enough where there is only one.
        batch_size: codes in one call of `cost`; changes nothing but memory.

    Raises:
        UserError: fewer than two codes.
    """
    if len(codes) < 2:
        raise UserError(f"the bound got {len(codes)} held-out codes; it needs at least 2 for a standard error")
    step = torch.empty(repeats, len(codes), dtype=torch.int64)
    bits = torch.empty(repeats, len(codes), dtype=torch.float64)
    for repeat in range(repeats):
        for start in range(0, len(codes), batch_size):
            chunk = slice(start, start + batch_size)
            part = codes.slice(start, start + batch_size)
            part = replace(part, z_0=part.z_0.float())
            position = (part.index.double() * _GOLDEN_RATIO + repeat / repeats) % 1.0
            n = (position * steps).long()
            with torch.no_grad(), ieee_float32():
                nats = cost(part, n, repeat)
            step[repeat, chunk], bits[repeat, chunk] = n.cpu(), nats.double().cpu() * (steps / math.log(2))
    per_code = bits.mean(0)
    profile = torch.bincount(step.flatten(), bits.flatten(), steps) / bits.numel()
    # Codes meet different steps, so the spread over codes covers the choice of data and that of steps.
    error = float(per_code.std() / math.sqrt(len(codes)))
    return Bound(len(codes), float(per_code.mean()), error, tuple(profile.tolist()), tuple(per_code.tolist()))
