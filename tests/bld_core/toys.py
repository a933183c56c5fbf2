"""Small worlds in which everything can be counted: shared by the tests of bld_core."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bld_core.autoencoder import Autoencoder, AutoencoderConfig
from bld_core.bits import pack_bits
from bld_core.diffusion import calibrate, reverse_flip_probability, transition
from bld_core.images import LabelledImage, Sample
from bld_core.latents import Latents, latent_batches
from bld_core.noise import uniform
from bld_core.prior import Prior, PriorConfig
from bld_core.schedule import NoiseSchedule
from bld_core.training import Batch, TrainingConfig

SCHEDULES = ("linear", "cosine", "sigmoid")

# --- The 3-bit toy: 8 states, one token of 3 bits -------------------------------------------------------------------

STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
_FLIPS = STATES[:, None] != STATES[None, :]  # (z_t, z_0, bit)


def toy_distribution(seed: int) -> Tensor:
    """P(z_0) over the 8 states, correlated, with every state possible."""
    return torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


def state_number(z: Tensor) -> Tensor:
    """The row of STATES that each code (..., 3) is."""
    return (z @ torch.tensor([4.0, 2.0, 1.0], dtype=z.dtype)).long()


def oracle_evidence(p: Tensor, k_t: float) -> Tensor:
    """The cavity log-odds that each bit of each z_t is flipped, judged from its other bits: (z_t, bit)."""
    keep = transition(torch.ones((), dtype=torch.float64), 1.0, k_t)
    likelihood = torch.where(_FLIPS, 1 - keep, keep)  # q(bit of z_t | bit of z_0)
    evidence = torch.empty(8, 3, dtype=torch.float64)
    for bit in range(3):
        others = [other for other in range(3) if other != bit]
        weight = p * likelihood[:, :, others].prod(-1)  # (z_t, z_0)
        flipped = _FLIPS[:, :, bit]
        evidence[:, bit] = ((weight * flipped).sum(1) / (weight * ~flipped).sum(1)).log()
    return evidence


def chain_distribution(p: Tensor, schedule: NoiseSchedule, grid: list[int]) -> Tensor:
    """The exact distribution over the 8 states that the oracle's reverse chain ends in."""
    k = schedule.k.tolist()
    now = torch.full((8,), 1 / 8, dtype=torch.float64)
    for t, s in itertools.pairwise(grid):
        r = torch.sigmoid(calibrate(oracle_evidence(p, k[t]), k[t]))
        change = reverse_flip_probability(r, k[s], k[t])[:, None, :]  # (z_t, 1, bit)
        now = now @ torch.where(_FLIPS, change, 1 - change).prod(-1)
    return now


def conditional_distributions(p: Tensor) -> Tensor:
    """P(z_0 | one bit is known), for each bit and each of its values: (bit, value, z_0)."""
    joint = p * known_states()
    return joint / joint.sum(-1, keepdim=True)


def known_states(k: float = 1.0) -> Tensor:
    """q(one bit of the state | that bit of z_0 is known), at signal k: (bit, value, state)."""
    values = torch.tensor([0.0, 1.0], dtype=torch.float64)[None, :, None]
    one = transition(values, 1.0, k)
    return torch.where(STATES.T[:, None] == 1, one, 1 - one)


def inpainting_distributions(p: Tensor, schedule: NoiseSchedule, jumps: int | None) -> Tensor:
    """The exact distributions that inpainting with one known bit ends in, the oracle's: (bit, value, z_0).

    `jumps` is how often replacement takes each step again; None is the conditioned chain.
    """
    k = schedule.k.tolist()
    given = conditional_distributions(p)
    unknown = ~torch.eye(3, dtype=torch.bool)
    now = torch.full((3, 2, 1, 8), 1 / 8, dtype=torch.float64)
    for t in range(schedule.steps, 0, -1):
        plain = oracle_evidence(p, k[t])
        reverse = torch.empty(3, 2, 8, 8, dtype=torch.float64)
        for bit, value in itertools.product(range(3), range(2)):
            evidence = plain if jumps is not None else oracle_evidence(given[bit, value], k[t])
            r = torch.sigmoid(calibrate(evidence, k[t]))
            change = reverse_flip_probability(r, k[t - 1], k[t])[:, None]
            reverse[bit, value] = torch.where(_FLIPS, change, 1 - change)[:, :, unknown[bit]].prod(-1)
        reverse = reverse * known_states(k[t - 1] if jumps is not None else 1.0)[:, :, None]
        now = now @ reverse
        if jumps:
            beta = torch.tensor(1 - k[t] / k[t - 1], dtype=torch.float64)
            forward = torch.where(_FLIPS, beta / 2, 1 - beta / 2).prod(-1)
            now = now @ torch.linalg.matrix_power(forward @ reverse, jumps)
    return now[:, :, 0]


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


class Oracle:
    """The perfect denoiser of a 3-bit toy."""

    def __init__(self, p: Tensor, schedule: NoiseSchedule) -> None:
        self.steps = schedule.steps
        levels = schedule.k.tolist()
        self.tables = [torch.zeros(8, 3)] + [oracle_evidence(p, k_t).float() for k_t in levels[1:]]

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        t = (time[0] * self.steps).round().long()
        return self.tables[int(t)][state_number(z)]


class TokenOracle:
    """The perfect denoiser of a toy whose 3 bits are 3 tokens of one bit; `given` are those of its conditionals."""

    def __init__(self, p: Tensor, schedule: NoiseSchedule) -> None:
        self.plain = Oracle(p, schedule)
        self.given = [[Oracle(q, schedule) for q in of_bit] for of_bit in conditional_distributions(p)]

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return self.plain(z.squeeze(-1), time, labels)[..., None]


# --- Tiny networks and data -----------------------------------------------------------------------------------------


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Move every weight at random, so that no zero initialisation hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tiny_prior(
    seed: int = 0, classes: int = 3, tokens: int = 4, bits: int = 8, known_share: float = 0.0, layers: int = 1
) -> Prior:
    torch.manual_seed(seed)
    config = PriorConfig(layers=layers, width=16, heads=2, classes=classes, known_share=known_share)
    return Prior(config, tokens, bits)


TINY_AUTOENCODER = AutoencoderConfig(bits=8, channels=8, multipliers=[1, 1, 2], blocks=1, attention=[4])


def tiny_autoencoder(seed: int = 0, channels: int = 1) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(TINY_AUTOENCODER, channels).eval()


def random_latents(rows: int, shape: tuple[int, int, int] = (2, 2, 8), classes: int = 3) -> Latents:
    """An encoded data set of random bits, in memory."""
    h, w, c = shape
    index = torch.arange(rows)
    bits = (uniform(5, "toy bits", index, h * w * c) < 0.3).to(torch.uint8)
    keys = [f"{i:04d}" for i in range(rows)]
    return Latents(pack_bits(bits), index % classes, keys, shape, {}, "toy")


def toy_batches(config: TrainingConfig, rows: int, start_step: int = 0) -> Iterator[Batch]:
    return latent_batches(random_latents(rows), config, 7, start_step)


def toy_images(count: int, size: int = 8, channels: int = 1) -> list[LabelledImage]:
    """Images that differ from one another, keyed 0000.., of classes 0, 1, 2, -1 in turn."""
    pixels = np.random.default_rng(3).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return [LabelledImage(f"{i:04d}", image, i % 4 if i % 4 < 3 else -1) for i, image in enumerate(pixels)]


def png_of(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """The PNG file of (H, W), (H, W, 1) or (H, W, 3) pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(out, format="PNG")
    return out.getvalue()


def toy_samples(count: int, size: int = 8, channels: int = 1) -> list[Sample]:
    """The same images as PNG files."""
    return [Sample(i.key, "png", png_of(i.pixels), i.label) for i in toy_images(count, size, channels)]
