"""The likelihood bound on held-out codes, in bits per latent bit: one estimator for the chains of every prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bld_core.diffusion.process import Denoiser, Target, check_grid, diffusion_terms, evidence_network
from bld_core.diffusion.schedule import NoiseSchedule
from bld_core.errors import UserError
from bld_core.noise import uniform

_GOLDEN_RATIO = 0.6180339887498949  # its multiples fill [0, 1) evenly, however many are taken


@dataclass(frozen=True)
class Bound:
    """A likelihood bound in bits per latent bit: 1.0 is what the uniform prior pays; lower is better.

    Attributes:
        codes: that it is the mean of.
        bits_per_bit: the bound.
        standard_error: of the bound; it covers the choice of data and of noise.
        profile: what each step of the grid adds to the bound, from the one that ends in the code to the one that starts
            in pure noise: over all T steps, profile[t - 1] is the mean L_vlb(t), in bits a bit. The entries sum to the
            bound, to float64 rounding. Each comes from the samples that met its step alone: where T is large, add up
            neighbours.
    """

    codes: int
    bits_per_bit: float
    standard_error: float
    profile: tuple[float, ...]


def merge_bounds(parts: Sequence[Bound]) -> Bound:
    """The bound of all codes from those of their parts, each of which was told the number of its first code."""
    codes = sum(part.codes for part in parts)
    mean = sum(part.codes * part.bits_per_bit for part in parts) / codes
    squares = sum(
        part.codes * ((part.codes - 1) * part.standard_error**2 + (part.bits_per_bit - mean) ** 2) for part in parts
    )
    profiles = torch.tensor([part.profile for part in parts], dtype=torch.float64)
    weights = torch.tensor([part.codes / codes for part in parts], dtype=torch.float64)
    return Bound(codes, mean, math.sqrt(squares / (codes - 1) / codes), tuple((weights @ profiles).tolist()))


def likelihood_bound(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    schedule: NoiseSchedule,
    grid: Sequence[int] | None = None,
    *,
    target: Target = "flip",
    seed: int = 0,
    repeats: int = 8,
    batch_size: int = 256,
    first: int = 0,
) -> Bound:
    """bld_core/README.md, section 5: nll = sum E[L_vlb(s, t)] / ln 2 over a chain's steps t -> s, on held-out codes.

    Steps are stratified: sample i meets `repeats` of them that are spread evenly over the grid, and so do the samples
    together. The flips are keyed on (seed, sample, repeat): two priors are judged on the same noise.

    Args:
        denoiser: network of `target`.
        z_0: clean codes, 0/1, (M, N, C).
        labels: int64 (M,) or None.
        schedule: of the noise.
        grid: the levels t that the chain visits, decreasing, from T to 0, as `schedule.grid` gives them; None: all.
        target: what the network predicts.
        seed: of the flips.
        repeats: steps that a sample meets.
        batch_size: codes in one forward pass; changes nothing but memory.
        first: number of the first code, on which the steps and the noise of each are keyed: see `merge_bounds`.

    Raises:
        UserError: fewer than two codes, a grid that is none, or one that skips steps for target z_prev.
    """
    grid = range(schedule.steps, -1, -1) if grid is None else grid
    levels = torch.tensor(list(reversed(grid)), device=z_0.device)
    if len(levels) < 2 or levels[0] != 0 or levels[-1] != schedule.steps or bool((levels.diff() <= 0).any()):
        raise UserError(f"the grid is {list(grid)}; it must decrease from T = {schedule.steps} to 0")
    check_grid(grid, schedule, target)
    network = evidence_network(denoiser, schedule, target)
    count = len(levels) - 1

    def term(z: Tensor, y: Tensor | None, index: Tensor, n: Tensor, repeat: int) -> Tensor:
        u = uniform(seed, f"bound flips {repeat}", index, math.prod(z.shape[1:])).view(z.shape)
        return diffusion_terms(network, z, y, levels[n + 1], u, schedule, s=levels[n])[1]

    return stratified_bound(term, z_0, labels, count, repeats, batch_size, first)


def stratified_bound(
    term: Callable[[Tensor, Tensor | None, Tensor, Tensor, int], Tensor],
    z_0: Tensor,
    labels: Tensor | None,
    count: int,
    repeats: int,
    batch_size: int = 256,
    first: int = 0,
) -> Bound:
    """The sum of what the steps of any chain cost, on held-out codes, as `likelihood_bound` has it.

    Args:
        term: (z_0, labels, index, n, repeat) -> (B,) nats a bit: what each sample pays for its step n, int64 (B,), of
            which n = 0 is the one that ends in the code; its noise is keyed on (index, repeat).
        z_0: clean codes, 0/1, (M, N, C).
        labels: int64 (M,) or None.
        count: steps of the chain.
        repeats: steps that a sample meets; one is enough where there is only one.
        batch_size: codes in one forward pass; changes nothing but memory.
        first: number of the first code, on which the steps and the noise of each are keyed: see `merge_bounds`.

    Raises:
        UserError: fewer than two codes.
    """
    if len(z_0) < 2:
        raise UserError(f"the bound got {len(z_0)} held-out codes; it needs at least 2 for a standard error")
    step = torch.empty(repeats, len(z_0), dtype=torch.int64)
    bits = torch.empty(repeats, len(z_0), dtype=torch.float64)
    for repeat in range(repeats):
        for start in range(0, len(z_0), batch_size):
            chunk = slice(start, start + batch_size)
            z = z_0[chunk].float()
            index = torch.arange(start, start + len(z), device=z.device) + first
            position = (index.double() * _GOLDEN_RATIO + repeat / repeats) % 1.0
            n = (position * count).long()
            with torch.no_grad():
                nats = term(z, None if labels is None else labels[chunk], index, n, repeat)
            step[repeat, chunk], bits[repeat, chunk] = n.cpu(), nats.double().cpu() * (count / math.log(2))
    per_sample = bits.mean(0)
    profile = torch.bincount(step.flatten(), bits.flatten(), count) / bits.numel()
    # Samples carry different levels, so this spread covers the data and the choice of level.
    error = float(per_sample.std() / math.sqrt(len(z_0)))
    return Bound(len(z_0), float(per_sample.mean()), error, tuple(profile.tolist()))
