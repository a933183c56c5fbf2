"""Small worlds in which everything can be counted: shared by the tests of bld_core."""

from __future__ import annotations

import atexit
import functools
import io
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import Autoencoder, AutoencoderConfig
from bld_core.data.images import LabelledImage
from bld_core.data.shards import Sample
from bld_core.diffusion.groups import bits_of, image_of_step, joint_log_posterior, step_law, value_of
from bld_core.diffusion.loss import vlb_loss
from bld_core.diffusion.process import (
    Calibration,
    Denoiser,
    DiffusionProcess,
    Target,
    calibrate,
    reverse_flip_probability,
    transition,
)
from bld_core.diffusion.schedule import NoiseSchedule, make_schedule
from bld_core.latents.bits import pack_bits
from bld_core.latents.loader import latent_batches
from bld_core.latents.reader import Latents, open_latents
from bld_core.latents.writer import MANIFEST, LatentFile, LatentRows, Manifest, Split, describe_file, latent_shard_bytes
from bld_core.noise import uniform
from bld_core.prior.transformer import Prior, PriorConfig
from bld_core.storage import files
from bld_core.training.loop import Batch, TrainingConfig

SCHEDULES = ("linear", "cosine", "sigmoid")
TARGETS: tuple[Target, ...] = ("flip", "z0", "z_prev")

# --- The 3-bit toy: 8 states, one token of 3 bits -------------------------------------------------------------------

STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
_FLIPS = STATES[:, None] != STATES[None, :]  # (z_t, z_0, bit)


def toy_process(name: str, steps: int, target: Target = "flip", calibration: Calibration = "bayes") -> DiffusionProcess:
    """A process of a named schedule."""
    return DiffusionProcess(make_schedule(name, steps), target, calibration)


def toy_distribution(seed: int) -> Tensor:
    """P(z_0) over the 8 states, correlated, with every state possible."""
    return torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


def state_number(z: Tensor) -> Tensor:
    """The row of STATES that each code (..., 3) is."""
    return (z @ torch.tensor([4.0, 2.0, 1.0], dtype=z.dtype)).long()


def _bits_given(k_s: float, k_t: float) -> Tensor:
    """q(bit of z_t | bit of z_s) for every pair of states: (z_t, z_s, bit)."""
    keep = transition(torch.ones((), dtype=torch.float64), k_s, k_t)
    return torch.where(_FLIPS, 1 - keep, keep)


def _cavity_odds(p: Tensor, k_t: float, event: Tensor) -> Tensor:
    """Log-odds of an event (z_t, z_0, bit), each bit judged from the other bits of z_t: (z_t, bit)."""
    likelihood = _bits_given(1.0, k_t)
    odds = torch.empty(8, 3, dtype=torch.float64)
    for bit in range(3):
        others = [other for other in range(3) if other != bit]
        weight = p * likelihood[:, :, others].prod(-1)  # (z_t, z_0)
        odds[:, bit] = ((weight * event[:, :, bit]).sum(1) / (weight * ~event[:, :, bit]).sum(1)).log()
    return odds


def oracle_evidence(p: Tensor, k_t: float) -> Tensor:
    """The cavity log-odds that each bit of each z_t is flipped, judged from its other bits: (z_t, bit)."""
    return _cavity_odds(p, k_t, _FLIPS)


def oracle_change(p: Tensor, k_s: float, k_t: float) -> Tensor:
    """P(bit of z_s != bit of z_t | z_t), by counting all z_0 and z_s: (z_t, bit)."""
    whole = p * _bits_given(1.0, k_s).prod(-1)  # (z_s, z_0)
    joint = _bits_given(k_s, k_t).prod(-1) * whole.sum(1)  # (z_t, z_s)
    return (joint[:, :, None] * _FLIPS).sum(1) / joint.sum(1, keepdim=True)


def oracle_output(p: Tensor, k_t: float, process: DiffusionProcess) -> Tensor:
    """What the perfect network of a process emits, (z_t, bit), each by counting what its target asks for."""
    event = _FLIPS if process.target == "flip" else (STATES == 1).expand(8, 8, 3)
    if process.calibration == "bayes":
        return _cavity_odds(p, k_t, event)
    weight = (p * _bits_given(1.0, k_t).prod(-1))[:, :, None]  # given all bits of z_t
    return ((weight * event).sum(1) / (weight * ~event).sum(1)).log()


def least_vlb(p: Tensor, k_s: float, k_t: float) -> float:
    """The least E[L_vlb] of the step t -> s, H(z_s | z_t) - H(z_s | z_t, z_0) of the bits of z_s, z_0; in nats."""
    to_s, to_t = _bits_given(1.0, k_s), _bits_given(k_s, k_t)
    ones = torch.tensor([0.0, 1.0], dtype=torch.float64)
    total = 0.0
    for bit in range(3):
        others = [other for other in range(3) if other != bit]
        rest = _bits_given(1.0, k_t)[:, :, others].prod(-1)  # (z_t, z_0): the other bits take any way
        value = STATES[:, bit] == ones[:, None]  # (value, state)
        s_0 = torch.stack([to_s[value[v].double().argmax(), :, bit] for v in (0, 1)], 1)  # (z_0, z_s's bit)
        t_s = torch.stack([to_t[:, value[v].double().argmax(), bit] for v in (0, 1)], 1)  # (z_t, z_s's bit)
        joint = (p * rest)[:, :, None] * s_0[None] * t_s[:, None]  # (z_t, z_0, z_s's bit)
        given_bit = torch.stack([joint[:, value[v]].sum(1) for v in (0, 1)], 1)  # (z_t, z_0's bit, z_s's bit)
        for table, sign in ((joint.sum(1), 1), (given_bit, -1)):
            total -= sign * float(torch.xlogy(table, table / table.sum(-1, keepdim=True)).sum())
    return total / 3


def exact_profile(p: Tensor, schedule: NoiseSchedule, grid: list[int]) -> Tensor:
    """E[L_vlb] of each step of a grid under the oracle, in bits a bit, the step that ends in the code first."""
    k = schedule.k.tolist()
    steps: list[Tensor] = []
    for t, s in itertools.pairwise(grid):
        vlb = vlb_loss(oracle_evidence(p, k[t])[:, None].expand(8, 8, 3), _FLIPS, k[s], k[t]).mean(-1)
        steps.append((p * _bits_given(1.0, k[t]).prod(-1) * vlb).sum() / math.log(2))
    return torch.stack(steps[::-1])


def chain_distribution(p: Tensor, process: DiffusionProcess, grid: list[int]) -> Tensor:
    """The exact distribution over the 8 states that the oracle's reverse chain ends in."""
    k = process.schedule.k.tolist()
    now = torch.full((8,), 1 / 8, dtype=torch.float64)
    for t, s in itertools.pairwise(grid):
        evidence = process.evidence(oracle_output(p, k[t], process), STATES, k[t])
        r = torch.sigmoid(calibrate(evidence.bits, k[t]))
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

    def __init__(self, p: Tensor, process: DiffusionProcess) -> None:
        self.steps = process.schedule.steps
        levels = process.schedule.k[1:].tolist()
        self.table = torch.stack([oracle_output(p, k_t, process).float() for k_t in levels])

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        t = (time * self.steps).round().long()
        return self.table[t[:, None] - 1, state_number(z)]


def iid_oracle(p: float) -> Denoiser:
    """The evidence network that is right about bits that are 1 with probability p, each by itself."""
    return lambda z, time, labels: (1 - 2 * z) * math.log(p / (1 - p))


def toy_codes(p: Tensor, count: int) -> Tensor:
    """Codes (count, 1, 3) drawn from a 3-bit toy."""
    u = uniform(11, "toy codes", torch.arange(count), 1)[:, 0].double()
    return STATES[torch.searchsorted(p.cumsum(0), u).clamp(max=7)].float()[:, None]


class TokenOracle:
    """The perfect denoiser of a toy whose 3 bits are 3 tokens of one bit; `given` are those of its conditionals."""

    def __init__(self, p: Tensor, process: DiffusionProcess) -> None:
        self.plain = Oracle(p, process)
        self.given = [[Oracle(q, process) for q in of_bit] for of_bit in conditional_distributions(p)]

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None = None) -> Tensor:
        """Where there are marks, one token of each sample must have one."""
        one_token = z.transpose(1, 2)
        if known is None:
            return self.plain(one_token, time, labels).transpose(1, 2)
        assert bool((known.sum(1) == 1).all())
        every = [[oracle(one_token, time, labels) for oracle in of_bit] for of_bit in self.given]
        bit, value = known.long().argmax(1), z.squeeze(-1)[known].long()
        return torch.stack([torch.stack(of_bit) for of_bit in every])[bit, value, torch.arange(len(z))].transpose(1, 2)


# --- Groups: all codes of a few tokens --------------------------------------------------------------------------------


class GroupToy:
    """A law over all codes of a few tokens of a few bits, and the perfect network that judges groups of its bits.

    Attributes:
        p: P(z_0) of every code.
        states: every code, (codes, tokens, bits), the first bit of the first token counting most.
        process: schedule and groups.
    """

    def __init__(self, p: Tensor, shape: tuple[int, int], process: DiffusionProcess) -> None:
        self.p, self.process = p, process
        every = list(itertools.product((0.0, 1.0), repeat=math.prod(shape)))
        self.states = torch.tensor(every, dtype=torch.float64).view(-1, *shape)
        self.table = torch.stack([self.output(k_t).float() for k_t in process.schedule.k[1:].tolist()])

    def q(self, k_s: float, k_t: float) -> Tensor:
        """q(bit of z_t | bit of z_s) of every two codes: (z_t, z_s, token, bit)."""
        keep = transition(torch.ones((), dtype=torch.float64), k_s, k_t)
        return torch.where(self.states[:, None] != self.states[None], 1 - keep, keep)

    def output(self, k_t: float) -> Tensor:
        """What the perfect network emits for every z_t, by counting: l is a bit's log-odds from outside its group."""
        g, S = self.process.group, len(self.states)
        odds, residuals = list[Tensor](), list[Tensor]()
        bits = self.states.flatten(1).unflatten(1, (-1, g))  # (z_0, group, bit)
        values = bits_of(torch.arange(2**g)[:, None, None], g)[:, 0].double()
        likelihood = self.q(1.0, k_t).flatten(2).unflatten(2, (-1, g))
        for group in range(bits.shape[1]):
            others = [other for other in range(bits.shape[1]) if other != group]
            weight = self.p * likelihood[:, :, others].prod(-1).prod(-1)  # (z_t, z_0)
            of_value = (bits[:, group][:, None] == values).all(-1).double()  # (z_0, v)
            law = (weight @ of_value / weight.sum(1, keepdim=True)).clamp(min=1e-25)
            one = ((law @ values) / (law @ (1 - values))).log()  # (z_t, bit)
            odds.append(one)
            residuals.append(law.log() - one @ values.T)
        l_BNC = torch.stack(odds, 1).view(S, *self.states.shape[1:])
        if g == 1:
            return l_BNC
        return torch.cat([l_BNC, torch.stack(residuals, 1).view(S, self.states.shape[1], -1)], -1)

    def reverse_law(self, output: Tensor, k_s: float, k_t: float) -> Tensor:
        """P(z_s | z_t) of the reverse step from what a network emits for every z_t: (z_t, z_s)."""
        evidence, g = self.process.evidence(output, self.states, k_t), self.process.group
        if evidence.residual is None:
            change = reverse_flip_probability(torch.sigmoid(calibrate(evidence.bits, k_t)), k_s, k_t)[:, None]
            return torch.where(self.states[:, None] != self.states[None], change, 1 - change).flatten(2).prod(-1)
        p = joint_log_posterior(evidence, self.states, k_t).exp()
        of_groups = image_of_step(p, step_law(k_s, k_t, p)).flatten(1, 2)  # (z_t, group, value of the changes)
        v = value_of(self.states, g).flatten(1)  # (state, group)
        changes = (v[:, None] ^ v[None]).unbind(-1)  # of each group: (z_t, z_s)
        return torch.stack([of_groups[:, group].gather(1, d) for group, d in enumerate(changes)]).prod(0)

    def chain(self, grid: list[int]) -> Tensor:
        """The exact law over all codes that its reverse chain ends in."""
        k, now = self.process.schedule.k.tolist(), torch.full_like(self.p, 1 / len(self.p))
        for t, s in itertools.pairwise(grid):
            now = now @ self.reverse_law(self.output(k[t]), k[s], k[t])
        return now

    def bound(self, grid: list[int]) -> float:
        """The exact bound of a grid, in bits a bit: by counting z_0, z_t and z_s."""
        k, nats = self.process.schedule.k.tolist(), 0.0
        for t, s in itertools.pairwise(grid):
            law = self.reverse_law(self.output(k[t]), k[s], k[t])  # (z_t, z_s)
            to_s, to_t = (self.q(a, b).flatten(2).prod(-1) for a, b in ((1.0, k[s]), (k[s], k[t])))
            joint = self.p * to_s[None] * to_t[:, :, None]  # (z_t, z_s, z_0)
            given_0 = joint / joint.sum(1, keepdim=True)
            nats += float((torch.xlogy(joint, given_0) - torch.xlogy(joint, law[:, :, None])).sum())
        return nats / math.log(2) / math.prod(self.states.shape[1:])

    def number(self, z: Tensor) -> Tensor:
        """Which of the codes each code is."""
        return value_of(z.flatten(1)[:, None], math.prod(self.states.shape[1:])).flatten()

    def __call__(self, z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        t = (time * self.process.schedule.steps).round().long()
        return self.table[t - 1, self.number(z)]


def group_toy(seed: int, group: int, steps: int, shape: tuple[int, int] = (2, 2)) -> GroupToy:
    """A toy of correlated bits, every code possible."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(2 ** math.prod(shape), generator=generator, dtype=torch.float64).softmax(0)
    return GroupToy(p, shape, DiffusionProcess(make_schedule("linear", steps), group=group))


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
    return make_autoencoder(TINY_AUTOENCODER, channels).eval()


def write_latents(
    folder: str, *, train: Sequence[int], validation: Sequence[int] = (3,), labelled: bool = True, **identity: Any
) -> None:
    """An encoded data set of random 2 x 2 x 8 bits: shards of so many rows. Row i has key i and class i modulo 3."""
    entries = list[LatentFile]()
    start = 0
    for shard, rows in enumerate((*train, *validation)):
        index = torch.arange(start, start + rows)
        bits = pack_bits((uniform(5, "toy bits", index, 32) < 0.3).to(torch.uint8))
        keys, labels, zeros = (
            [f"{i:04d}" for i in index],
            (index % 3 if labelled else -1 + 0 * index).tolist(),
            [0] * rows,
        )
        data = latent_shard_bytes(LatentRows(keys, labels, zeros, zeros, bits), {"shape": [2, 2, 8]})
        split: Split = "train" if shard < len(train) else "validation"
        name = f"{split}/{shard}.parquet"
        files.write_bytes(files.join(folder, name), data)
        entries.append(describe_file(name, data, rows, f"{shard}.tar", split, {}))
        start += rows
    files.write_json(files.join(folder, MANIFEST), Manifest(shape=(2, 2, 8), files=entries, **identity).to_json())


@functools.cache
def random_latents(*shards: int) -> Latents:
    """The training part of such a data set; its files are there until the process ends."""
    folder = tempfile.mkdtemp(prefix="toy-latents-")
    atexit.register(shutil.rmtree, folder)
    write_latents(folder, train=shards)
    return open_latents(folder)


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
    """The same images as PNG files, each with a class: 0 to 3."""
    return [Sample(i.key, "png", png_of(i.pixels), i.label % 4) for i in toy_images(count, size, channels)]


# --- What a GPU would do ----------------------------------------------------------------------------------------------

_PRODUCTS = ("mm", "addmm", "bmm", "convolution", "convolution_backward")


def tf32() -> tuple[bool, bool]:
    return bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32


class Arithmetic(TorchDispatchMode):
    """What a GPU would have been allowed at each product and convolution, and what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32 = set[tuple[bool, bool]]()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in _PRODUCTS:
            self.tf32.add(tf32())
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))
