"""Bernoulli diffusion over binary codes (Section 4): one function per equation.

Shapes: z_BNC is a code of B samples, N tokens and C bits a token, values 0 or 1.
k_t, k_s: the schedule's signal at t and at an earlier s < t; a float, or a tensor that broadcasts.
Evidence: the network's logits e(z_t, t) that a bit of z_t differs from the clean one, judged from all other bits.
r: the *probability* that a bit of z_t differs from the clean one, given all of z_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.noise import uniform
from bld_core.schedule import NoiseSchedule, ScheduleName, make_schedule

_GOLDEN_RATIO = 0.6180339887498949  # its multiples fill [0, 1) evenly, however many are taken

Scalar = float | Tensor
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Bernoulli diffusion (Section 4).

    Args:
        steps: T, the number of noise levels in training.
        schedule: how the signal k_t falls with t/T.
        vlb_weight: lambda of Eq. 13, the weight of the variational term beside the residual term; 0 gives it no weight.
        balance: "flip" balances the two classes of the residual term, which gives low noise levels less weight.
    """

    steps: int = 64
    schedule: ScheduleName = "linear"
    vlb_weight: float = 0.1
    balance: Literal["none", "flip"] = "none"

    def __post_init__(self) -> None:
        if not 4 <= self.steps <= 1024:
            raise ValueError(f"diffusion.steps is {self.steps}; it must be 4..1024 (the paper uses 64)")
        if self.vlb_weight < 0:
            raise ValueError(f"diffusion.vlb_weight is {self.vlb_weight}; it must be 0 or more (the paper uses 0.1)")

    def make_schedule(self) -> NoiseSchedule:
        """The schedule that this configuration names."""
        return make_schedule(self.schedule, self.steps)


def transition(z_s: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eqs. 4, 5: q(z_t = 1 | z_s) = 1/2 + (k_t / k_s) (z_s - 1/2), as probabilities.

    s = 0 is the marginal (Eq. 5), s = t - 1 the single step (Eq. 4); z_s may itself be a probability,
    so that transitions compose.
    """
    return 0.5 + (k_t / k_s) * (z_s - 0.5)


def calibrate(evidence: Tensor, k_t: Scalar) -> Tensor:
    """Cavity odds times the bit's own likelihood ratio: logit r = e + log((1 - k_t) / (1 + k_t)).

    Logits in, logits out. The bit's own evidence is known in closed form, so it is added, not learned.
    """
    k = torch.as_tensor(k_t, dtype=torch.float64, device=evidence.device)
    offset = torch.log1p(-k) - torch.log1p(k)
    return evidence + offset.to(evidence.dtype)


def flip_given_residual(k_s: Scalar, k_t: Scalar) -> tuple[Scalar, Scalar]:
    """A and B of the exact reverse step: P(z_s != z_t | bit flipped), P(z_s != z_t | bit clean).

    A = beta (1 + k_s) / (2 (1 - k_t)): the bit is flipped; did it happen after s?
    B = beta (1 - k_s) / (2 (1 + k_t)): the bit is clean; was it flipped twice?      beta = 1 - k_t / k_s
    """
    beta = 1 - k_t / k_s
    return beta * (1 + k_s) / (2 * (1 - k_t)), beta * (1 - k_s) / (2 * (1 + k_t))


def reverse_flip_probability(r: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Exact reverse step (in place of Eq. 10): P(z_s != z_t | z_t) = r A + (1 - r) B, for any s < t.

    Args:
        r: probability that each bit of z_t differs from the clean one.
        k_s: signal at s.
        k_t: signal at t.

    Returns:
        Probability, shaped like r, that the bit changes between t and s. At s = 0 it is r itself.
    """
    flipped, clean = flip_given_residual(k_s, k_t)
    return r * flipped + (1 - r) * clean


def residual_loss(evidence: Tensor, flip: Tensor, k_t: Scalar) -> Tensor:
    """Eq. 12: BCE(sigmoid(logit r), f) for each bit, in nats; f = z_t XOR z_0."""
    return F.binary_cross_entropy_with_logits(calibrate(evidence, k_t), flip, reduction="none")


def balanced_residual_loss(evidence: Tensor, flip: Tensor, k_t: Scalar) -> Tensor:
    """Eq. 12, class-balanced: BCE on e itself, weights 1 - p on flipped and p on clean bits, p = (1 - k_t)/2.

    Its optimum is the same evidence as that of `residual_loss`; low noise levels get less weight.
    """
    p = (1 - torch.as_tensor(k_t, dtype=evidence.dtype, device=evidence.device)) / 2
    return -((1 - p) * flip * F.logsigmoid(evidence) + p * (1 - flip) * F.logsigmoid(-evidence))


def vlb_loss(evidence: Tensor, flip: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eq. 7, L_vlb(t): KL(Bern(f ? A : B) || Bern(r A + (1 - r) B)) for each bit, in nats.

    One formula for every pair s < t: at s = 0 it *is* the BCE of Eq. 12. Computed in log space.
    """
    logit_r = calibrate(evidence, k_t)
    log_r, log_clean = F.logsigmoid(logit_r), F.logsigmoid(-logit_r)
    a, b = (
        torch.as_tensor(p, dtype=torch.float64, device=evidence.device).clamp(0, 1)
        for p in flip_given_residual(k_s, k_t)
    )
    log_a, log_b, log_not_a, log_not_b = (x.to(evidence.dtype) for x in (a.log(), b.log(), (-a).log1p(), (-b).log1p()))
    log_change = torch.logaddexp(log_r + log_a, log_clean + log_b)
    log_stay = torch.logaddexp(log_r + log_not_a, log_clean + log_not_b)
    q = torch.where(flip.bool(), a.to(evidence.dtype), b.to(evidence.dtype))
    entropy = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)
    # Where q is exactly 0 or 1 the other logarithm may be -inf; its weight is 0, and so must be its product.
    cross = torch.where(q > 0, q * log_change, 0) + torch.where(q < 1, (1 - q) * log_stay, 0)
    return entropy - cross


def corrupt(z_0: Tensor, k_t: Scalar, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: draw z_t ~ q(z_t | z_0) with the uniforms u; returns (z_t, flip = z_t XOR z_0)."""
    z_t = (u < transition(z_0, 1.0, k_t)).to(z_0.dtype)
    return z_t, (z_t - z_0).abs()


def evidence_given(
    denoiser: Denoiser, z_t: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None
) -> Tensor:
    """Evidence logits; where there is a mask of known tokens, bool (B, N), the denoiser takes it as fourth argument."""
    if known is None:
        return denoiser(z_t, time, labels)
    return cast("Callable[..., Tensor]", denoiser)(z_t, time, labels, known)


def diffusion_terms(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    t: Tensor,
    u: Tensor,
    schedule: NoiseSchedule,
    balance: Literal["none", "flip"] = "none",
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_residual and L_vlb at given noise levels, each the mean over a sample's unknown bits.

    Args:
        denoiser: evidence network, (z_BNC, t/T of shape (B,), labels) -> evidence logits (B, N, C).
        z_0: clean code, float 0/1, (B, N, C).
        labels: int64 (B,) or None.
        t: int64 (B,), values 1..T.
        u: uniforms in [0, 1), shaped like z_0: they decide the flips.
        schedule: gives the signal at every t.
        balance: which residual loss.
        known: bool (B, N), tokens that stay clean, are marked to the denoiser and do not count; None: all count.

    Returns:
        (residual, vlb), each (B,), in nats a bit.
    """
    k = schedule.k.to(z_0.device)
    k_t, k_s = (k[i].view(-1, *[1] * (z_0.ndim - 1)) for i in (t, t - 1))
    z_t, flip = corrupt(z_0, k_t.to(z_0.dtype), u)
    time = (t / schedule.steps).to(z_0.dtype)
    if known is not None:
        z_t = torch.where(known[..., None], z_0, z_t)
    evidence = evidence_given(denoiser, z_t, time, labels, known).float()
    residual = (balanced_residual_loss if balance == "flip" else residual_loss)(evidence, flip, k_t)
    return _mean_of_unknown(residual, known), _mean_of_unknown(vlb_loss(evidence, flip, k_s, k_t), known)


def _mean_of_unknown(loss: Tensor, known: Tensor | None) -> Tensor:
    """A loss of each bit -> its mean over each sample's unknown tokens, (B,)."""
    if known is None:
        return loss.flatten(1).mean(1)
    return loss.mean(-1).masked_fill(known, 0).sum(1) / (~known).sum(1)


def diffusion_loss(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    index: Tensor,
    schedule: NoiseSchedule,
    config: DiffusionConfig,
    seed: int,
    known: Tensor | None = None,
) -> dict[str, Tensor]:
    """Eq. 13: L = L_residual + lambda L_vlb, t ~ Uniform{1..T}, means over batch, tokens and bits.

    Args:
        denoiser: evidence network.
        z_0: clean code, float 0/1, (B, N, C).
        labels: int64 (B,) or None.
        index: int64 (B,): the global sample index, on which t and the flips are keyed.
        schedule: of the noise.
        config: lambda and the residual loss.
        seed: of t and the flips.
        known: bool (B, N), as in `diffusion_terms`.

    Returns:
        {"loss", "residual", "vlb"}: scalars, in nats a bit.
    """
    t = 1 + (uniform(seed, "diffusion time", index, 1)[:, 0] * schedule.steps).long()
    u = uniform(seed, "diffusion flips", index, math.prod(z_0.shape[1:])).view(z_0.shape)
    residual, vlb = (x.mean() for x in diffusion_terms(denoiser, z_0, labels, t, u, schedule, config.balance, known))
    return {"loss": residual + config.vlb_weight * vlb, "residual": residual, "vlb": vlb}


@dataclass(frozen=True)
class Bound:
    """A likelihood bound in bits per latent bit: 1.0 is what the uniform prior pays; lower is better."""

    bits_per_bit: float
    standard_error: float


def likelihood_bound(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    schedule: NoiseSchedule,
    *,
    seed: int = 0,
    repeats: int = 8,
    batch_size: int = 256,
) -> Bound:
    """Section 5 of the mathematics: nll = sum_{t=1..T} E[L_vlb(t)] / ln 2, on held-out codes.

    Noise levels are stratified: sample i meets `repeats` levels that are spread evenly over 1..T, and so do the
    samples together. The flips are keyed on (seed, sample, repeat): two priors are judged on the same noise.

    Args:
        denoiser: evidence network.
        z_0: clean codes, 0/1, (M, N, C).
        labels: int64 (M,) or None.
        schedule: of the noise.
        seed: of the flips.
        repeats: noise levels a sample.
        batch_size: codes in one forward pass; changes nothing but memory.
    """
    if len(z_0) < 2:
        raise ValueError(f"the bound got {len(z_0)} held-out codes; it needs at least 2 for a standard error")
    total = torch.zeros(len(z_0), dtype=torch.float64)
    for repeat in range(repeats):
        for start in range(0, len(z_0), batch_size):
            chunk = slice(start, start + batch_size)
            z = z_0[chunk].float()
            index = torch.arange(start, start + len(z), device=z.device)
            u = uniform(seed, f"bound flips {repeat}", index, math.prod(z.shape[1:])).view(z.shape)
            position = (index.double() * _GOLDEN_RATIO + repeat / repeats) % 1.0
            t = 1 + (position * schedule.steps).long()
            with torch.no_grad():
                _, vlb = diffusion_terms(denoiser, z, None if labels is None else labels[chunk], t, u, schedule)
            total[chunk] += vlb.double().cpu()
    per_sample = total / repeats * schedule.steps / math.log(2)
    # Samples carry different levels, so this spread covers the data and the choice of level.
    return Bound(float(per_sample.mean()), float(per_sample.std() / math.sqrt(len(z_0))))
