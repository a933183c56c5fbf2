"""What the network is trained on (Eqs. 7, 12, 13): one function per equation. `process.py` explains the words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.process import (
    CodeBatch,
    Denoiser,
    DiffusionConfig,
    DiffusionProcess,
    Scalar,
    calibrate,
    corrupt,
    evidence_network,
    network_output,
    reverse_flip_coefficients,
)
from bld_core.noise import uniform


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
    a, b = _coefficients(k_s, k_t, evidence)
    log_a, log_b, log_not_a, log_not_b = (x.to(evidence.dtype) for x in (a.log(), b.log(), (-a).log1p(), (-b).log1p()))
    log_change = torch.logaddexp(log_r + log_a, log_clean + log_b)
    log_stay = torch.logaddexp(log_r + log_not_a, log_clean + log_not_b)
    return _posterior_kl(flip, a, b, log_change, log_stay)


def z_prev_loss(output: Tensor, flip: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eq. 7 for target z_prev: KL(Bern(f ? A : B) || Bern(sigmoid(output))) for each bit, in nats; s = t - 1."""
    a, b = _coefficients(k_s, k_t, output)
    return _posterior_kl(flip, a, b, F.logsigmoid(output), F.logsigmoid(-output))


def _coefficients(k_s: Scalar, k_t: Scalar, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in float64, on a tensor's device."""
    a, b = reverse_flip_coefficients(k_s, k_t)
    return (
        torch.as_tensor(a, dtype=torch.float64, device=like.device).clamp(0, 1),
        torch.as_tensor(b, dtype=torch.float64, device=like.device).clamp(0, 1),
    )


def _posterior_kl(flip: Tensor, a: Tensor, b: Tensor, log_change: Tensor, log_stay: Tensor) -> Tensor:
    """KL(Bern(f ? A : B) || Bern(exp(log_change))), where exp(log_stay) is the rest."""
    q = torch.where(flip.bool(), a.to(log_change.dtype), b.to(log_change.dtype))
    entropy = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)
    # Where q is exactly 0 or 1 the other logarithm may be -inf; its weight is 0, and so must be its product.
    cross = torch.where(q > 0, q * log_change, 0) + torch.where(q < 1, (1 - q) * log_stay, 0)
    return entropy - cross


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
        denoiser: network of the process's target; its output is read as evidence.
        process: schedule and target.
        codes: clean, float.
        step: of each sample, and its noise.
        balance: which residual loss.
        known: tokens that stay clean in z_t, are told to the network and do not count.

    Returns:
        (residual, vlb), each (B,), in nats a bit.
    """
    network = evidence_network(denoiser, process)
    evidence, flip = _noised_output(network, process, codes, step, known)
    k_s, k_t = (process.schedule.signal(level, codes.z_0) for level in (step.s, step.t))
    residual = (balanced_residual_loss if balance == "flip" else residual_loss)(evidence, flip, k_t)
    return _mean_of_unknown(residual, known), _mean_of_unknown(vlb_loss(evidence, flip, k_s, k_t), known)


def z_prev_term(
    denoiser: Denoiser, process: DiffusionProcess, codes: CodeBatch, step: Step, known: Tensor | None = None
) -> Tensor:
    """L_vlb of a network of target z_prev, otherwise as in `loss_terms`; s is t - 1, and there is no L_residual.

    The output is scored as it stands. Read as evidence, it would have no gradient outside [B, A].
    """
    output, flip = _noised_output(denoiser, process, codes, step, known)
    k_s, k_t = (process.schedule.signal(level, codes.z_0) for level in (step.s, step.t))
    return _mean_of_unknown(z_prev_loss(output, flip, k_s, k_t), known)


def _noised_output(
    network: Denoiser, process: DiffusionProcess, codes: CodeBatch, step: Step, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The network's output at z_t, float32, and the flips; known tokens stay clean in z_t, their flips do not count."""
    z_0, schedule = codes.z_0, process.schedule
    z_t, flip = corrupt(z_0, schedule.signal(step.t, z_0).to(z_0.dtype), step.u)
    if known is not None:
        z_t = torch.where(known[..., None], z_0, z_t)
    time = (step.t / schedule.steps).to(z_0.dtype)
    return network_output(network, z_t, time, codes.labels, known).float(), flip


def _mean_of_unknown(loss: Tensor, known: Tensor | None) -> Tensor:
    """A loss of each bit -> its mean over each sample's unknown tokens, (B,)."""
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

    Args:
        denoiser: network of the process's target.
        process: that `config` makes.
        codes: clean, float; t and the flips of each are keyed on its number.
        config: lambda, and which residual loss.
        seed: of t and the flips.
        known: as in `loss_terms`.

    Returns:
        {"loss", "residual", "vlb"}: scalars, in nats a bit. Target z_prev has no "residual": L = lambda L_vlb.
    """
    z_0, index = codes.z_0, codes.index
    t = 1 + (uniform(seed, "diffusion time", index, 1)[:, 0] * process.schedule.steps).long()
    u = uniform(seed, "diffusion flips", index, math.prod(z_0.shape[1:])).view(z_0.shape)
    step = Step(t, t - 1, u)
    if process.target == "z_prev":
        vlb = z_prev_term(denoiser, process, codes, step, known).mean()
        return {"loss": config.vlb_weight * vlb, "vlb": vlb}
    residual, vlb = (x.mean() for x in loss_terms(denoiser, process, codes, step, config.balance, known))
    return {"loss": residual + config.vlb_weight * vlb, "residual": residual, "vlb": vlb}
