"""The reverse process (Section 4.1): from fair coin flips to a code."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bld_core.diffusion import Denoiser, Target, calibrate, check_grid, evidence_network, reverse_flip_probability
from bld_core.noise import uniform
from bld_core.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from a trained prior (Section 4.1).

    Args:
        steps: number of reverse steps, 1..T; each is one pass of the network.
        spacing: equal steps of the signal "k", or of "t" as the paper's.
        temperature: tau, divides the evidence logits; below 1 is surer and less varied (the paper uses 0.9).
        guidance: w, pushes samples towards their class; 0 is none (the paper uses 2 on ImageNet).
        final: draw the last step from its distribution ("sample"), or take the likelier value ("mode").
    """

    steps: int = 16
    spacing: Literal["k", "t"] = "k"
    temperature: float = 0.9
    guidance: float = 0.0
    final: Literal["sample", "mode"] = "sample"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps is {self.steps}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be above 0 (the paper uses 0.9)")
        if self.guidance < 0:
            raise ValueError(f"sampling.guidance is {self.guidance}; it must be 0 (none) or more")


def guided_evidence(denoiser: Denoiser, z_t: Tensor, time: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """Classifier-free guidance on evidence logits: e = (1 + w) e_cond - w e_uncond, in one batched call."""
    if labels is None or guidance == 0:
        return denoiser(z_t, time, labels)
    null = torch.full_like(labels, -1)
    both = denoiser(torch.cat([z_t, z_t]), torch.cat([time, time]), torch.cat([labels, null]))
    conditional, unconditional = both.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


@torch.no_grad()
def sample_codes(
    denoiser: Denoiser,
    shape: tuple[int, int],
    labels: Tensor | None,
    index: Tensor,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    seed: int,
    target: Target = "flip",
) -> Tensor:
    """Draw codes by the exact reverse process.

        z_T ~ Bernoulli(1/2)
        for t > s along the grid T, ..., 0:
            e = guided evidence of z_t
            r = sigmoid(calibrate(e / tau, k_t))
            flip each bit of z_t with probability r A + (1 - r) B, giving z_s

    Args:
        denoiser: network of `target`, (z_BNC, t/T, labels) -> logits.
        shape: (tokens, bits) of a code.
        labels: int64 (B,) class indices, -1 for none; or None.
        index: int64 (B,): sample i is keyed on (seed, index[i], step) and does not depend on its batch.
        schedule: of the noise.
        config: the grid and the settings of the reverse process.
        seed: of the noise.
        target: what the network predicts; temperature and guidance work on the evidence in any case.

    Returns:
        Codes, float 0/1, (B, tokens, bits), on the device of `index`.

    Raises:
        ValueError: more steps than T, or fewer than T for target z_prev.
    """

    def noise(purpose: str) -> Tensor:
        return uniform(seed, purpose, index, math.prod(shape)).view(-1, *shape)

    grid = schedule.grid(config.steps, config.spacing)
    check_grid(grid, schedule, target)
    network = evidence_network(denoiser, schedule, target)
    k = schedule.k.tolist()
    z = (noise("sampling start") < 0.5).float()
    for t, s in itertools.pairwise(grid):
        time = torch.full((len(z),), t / schedule.steps, device=z.device)
        evidence = guided_evidence(network, z, time, labels, config.guidance).float()
        r = torch.sigmoid(calibrate(evidence / config.temperature, k[t]))
        flip_probability = reverse_flip_probability(r, k[s], k[t])
        threshold = 0.5 if s == 0 and config.final == "mode" else noise(f"sampling step {t}")
        z = (z - (threshold < flip_probability).float()).abs()
    return z
