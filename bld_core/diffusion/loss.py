"""What the network is trained on (Eqs. 7, 12, 13): one function per equation. `process.py` explains the words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.groups import image_of_step, in_groups, joint_log_posterior, step_law, sums_of_bits, value_of
from bld_core.diffusion.process import (
    CodeBatch,
    Denoiser,
    DiffusionConfig,
    DiffusionProcess,
    Scalar,
    calibrate,
    corrupt,
    exact_coefficients,
    network_output,
)
from bld_core.noise import uniform

_TINY = torch.finfo(torch.float32).tiny  # a probability below it is none
_LOST = math.log(1e-30)  # and what has this one, less, cannot be told from it after a step


def residual_loss(evidence: Tensor, flip: Tensor, k_t: Scalar) -> Tensor:
    """Eq. 12: the cross-entropy of flip and r for each bit, in nats; logit r is the calibrated evidence."""
    return F.binary_cross_entropy_with_logits(calibrate(evidence, k_t), flip, reduction="none")


def balanced_residual_loss(evidence: Tensor, flip: Tensor, k_t: Scalar) -> Tensor:
    """Eq. 12, class-balanced: the cross-entropy of flip and sigmoid(e), weighted 1 - p on flipped, p on clean bits.

    p = (1 - k_t) / 2 is the share of flipped bits, so both classes weigh the same. The optimum is the same evidence as
    that of `residual_loss`; low noise levels get less weight.
    """
    p = (1 - torch.as_tensor(k_t, dtype=evidence.dtype, device=evidence.device)) / 2
    return -((1 - p) * flip * F.logsigmoid(evidence) + p * (1 - flip) * F.logsigmoid(-evidence))


def vlb_loss(evidence: Tensor, flip: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eq. 7, L_vlb of a step t -> s: KL(Bern(f ? A : B) || Bern(r A + (1 - r) B)) for each bit, in nats.

    One formula for every pair s < t; at s = 0 it *is* the cross-entropy of Eq. 12. Computed in log space.
    """
    logit_r = calibrate(evidence, k_t)
    log_r, log_clean = F.logsigmoid(logit_r), F.logsigmoid(-logit_r)
    a, b = exact_coefficients(k_s, k_t, evidence)
    log_a, log_b, log_not_a, log_not_b = (x.to(evidence.dtype) for x in (a.log(), b.log(), (-a).log1p(), (-b).log1p()))
    log_change = torch.logaddexp(log_r + log_a, log_clean + log_b)
    log_stay = torch.logaddexp(log_r + log_not_a, log_clean + log_not_b)
    return _posterior_kl(flip, a, b, log_change, log_stay)


def _posterior_kl(flip: Tensor, a: Tensor, b: Tensor, log_change: Tensor, log_stay: Tensor) -> Tensor:
    """KL(Bern(f ? A : B) || Bern(exp(log_change))), where exp(log_stay) is the rest."""
    q = torch.where(flip.bool(), a.to(log_change.dtype), b.to(log_change.dtype))
    entropy = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)
    # Where q is exactly 0 or 1 the other logarithm may be -inf; its weight is 0, and so must be its product.
    cross = torch.where(q > 0, q * log_change, 0) + torch.where(q < 1, (1 - q) * log_stay, 0)
    return entropy - cross


def joint_residual_loss(log_p: Tensor, flip: Tensor) -> Tensor:
    """Eq. 12 of groups: the cross-entropy of a group's flips and log_p, in nats a bit, (B, N, C / g)."""
    group = flip.shape[-1] // log_p.shape[-2]
    return -log_p.gather(-1, value_of(flip, group)[..., None]).squeeze(-1) / group


def joint_vlb_loss(log_p: Tensor, flip: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eq. 7 of groups: KL(q(z_s | z_t, z_0) || p(z_s | z_t)) of each, in nats a bit, (B, N, C / g); any s < t.

    Given the true flips f the changes d of the bits are independent, q(d); p(d) mixes that over all values of the
    flips, p(d) >= p(f) q(d). Where p(f) is too small for that in float32, the KL counts as its upper bound -log p(f).
    """
    group = flip.shape[-1] // log_p.shape[-2]
    law = step_law(k_s, k_t, log_p)
    q_of_bits = torch.where(in_groups(flip, group)[..., None] == 1, *law[:, None, None, None].unbind(-2)[::-1])
    q = sums_of_bits(*q_of_bits.clamp(min=_TINY).log().unbind(-1)).exp()
    negentropy = torch.xlogy(q_of_bits, q_of_bits).sum((-2, -1))
    cross = (q * image_of_step(log_p.exp(), law).clamp(min=_TINY).log()).sum(-1)
    log_truth = log_p.gather(-1, value_of(flip, group)[..., None]).squeeze(-1)
    return torch.where(log_truth > _LOST, negentropy - cross, -log_truth) / group


@dataclass(frozen=True)
class Step:
    """The step t -> s that each sample is trained or scored on, and the noise that takes its code to z_t.

    Attributes:
        t: int64 (B,), 1..T.
        s: int64 (B,), 0..t - 1.
        u: uniforms in [0, 1), shaped like the codes: they decide which bits flip.
    """

    t: Tensor
    s: Tensor
    u: Tensor


def loss_terms(
    denoiser: Denoiser,
    process: DiffusionProcess,
    codes: CodeBatch,
    step: Step,
    balance: Literal["none", "flip"] = "none",
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_residual at t and L_vlb of the step t -> s, each the mean over a sample's unknown bits.

    Args:
        denoiser: network of the process; its output is read as evidence.
        process: schedule, target and groups.
        codes: clean, float.
        step: of each sample, and its noise.
        balance: which residual loss; groups have but one.
        known: tokens that stay clean in z_t, are told to the network and do not count.

    Returns:
        (residual, vlb), each (B,), in nats a bit.
    """
    z_0, schedule = codes.z_0, process.schedule
    k_s, k_t = (schedule.signal(level, z_0) for level in (step.s, step.t))
    z_t, flip = corrupt(z_0, k_t.to(z_0.dtype), step.u)
    if known is not None:
        z_t = torch.where(known[..., None], z_0, z_t)
    time = (step.t / schedule.steps).to(z_0.dtype)
    output = network_output(denoiser, z_t, time, codes.labels, known).float()
    evidence = process.evidence(output, z_t, k_t)
    if evidence.residual is None:
        residual = (balanced_residual_loss if balance == "flip" else residual_loss)(evidence.bits, flip, k_t)
        vlb = vlb_loss(evidence.bits, flip, k_s, k_t)
    else:
        log_p = joint_log_posterior(evidence, z_t, k_t)
        residual, vlb = joint_residual_loss(log_p, flip), joint_vlb_loss(log_p, flip, k_s, k_t)
    return _mean_of_unknown(residual, known), _mean_of_unknown(vlb, known)


def _mean_of_unknown(loss: Tensor, known: Tensor | None) -> Tensor:
    """A loss of each bit or group -> its mean over each sample's unknown tokens, (B,)."""
    if known is None:
        return loss.flatten(1).mean(1)
    return loss.mean(-1).masked_fill(known, 0).sum(1) / (~known).sum(1)


def diffusion_loss(
    denoiser: Denoiser,
    process: DiffusionProcess,
    codes: CodeBatch,
    config: DiffusionConfig,
    seed: int,
    known: Tensor | None = None,
) -> dict[str, Tensor]:
    """Eq. 13: L = L_residual + lambda L_vlb, t ~ Uniform{1..T}, s = t - 1; means over batch, tokens and bits.

    Of target z_prev it is T L_vlb, whose mean is the bound of all T steps.

    Args:
        denoiser: network of the process.
        process: that `config` makes.
        codes: clean, float; t and the flips of each are keyed on its number.
        config: lambda, and which residual loss.
        seed: of t and the flips.
        known: as in `loss_terms`.

    Returns:
        {"loss", "residual", "vlb"}: scalars, in nats a bit.
    """
    z_0, index = codes.z_0, codes.index
    t = 1 + (uniform(seed, "diffusion time", index, 1)[:, 0] * process.schedule.steps).long()
    u = uniform(seed, "diffusion flips", index, math.prod(z_0.shape[1:])).view(z_0.shape)
    terms = loss_terms(denoiser, process, codes, Step(t, t - 1, u), config.balance, known)
    residual, vlb = (x.mean() for x in terms)
    loss = process.schedule.steps * vlb if process.target == "z_prev" else residual + config.vlb_weight * vlb
    return {"loss": loss, "residual": residual, "vlb": vlb}
