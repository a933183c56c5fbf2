"""Bernoulli diffusion over binary codes (Section 4): one function per equation.

Shapes: z_BNC is a code of B samples, N tokens and C bits a token, values 0 or 1.
k_t, k_s: the schedule's signal at t and at an earlier s < t; a float, or a tensor that broadcasts.
Evidence: the network's logits e(z_t, t) that a bit of z_t differs from the clean one, judged from all other bits.
r: the *probability* that a bit of z_t differs from the clean one, given all of z_t.
Target: what the network's output stands for (Table 7); `evidence_network` makes evidence of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.schedule import NoiseSchedule, ScheduleName, make_schedule, schedule_from_betas
from bld_core.errors import UserError
from bld_core.noise import uniform

_CERTAIN = 1e-12  # the least r that an output of target z_prev is read as: its logit stays finite

Scalar = float | Tensor
Target = Literal["flip", "z0", "z_prev"]
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Bernoulli diffusion (Section 4), of prior.model binary; the other models do not read it.

    Args:
        steps: T, the number of noise levels in training.
        schedule: how the signal k_t falls with t/T; "betas" takes it from `betas`.
        betas: flip rates beta_1..beta_T in (0, 1], one for each step, for the schedule "betas" alone; the signal that
            they leave at T may be 0.001 at most.
        target: what the network predicts (Table 7): "flip", whether a bit differs from the clean one; "z0", the clean
            bit; "z_prev", whether a bit changes between t and t - 1, which is trained by the variational term alone and
            samples in all T steps only.
        vlb_weight: lambda of Eq. 13, the weight of the variational term beside the residual term; 0 gives it no weight.
        balance: "flip" balances the two classes of the residual term, which gives low noise levels less weight.
    """

    steps: int = 64
    schedule: ScheduleName = "linear"
    betas: list[float] = field(default_factory=list)
    target: Target = "flip"
    vlb_weight: float = 0.1
    balance: Literal["none", "flip"] = "none"

    def __post_init__(self) -> None:
        if not 4 <= self.steps <= 1024:
            raise UserError(f"diffusion.steps is {self.steps}; it must be 4..1024 (the paper uses 64)")
        if self.vlb_weight < 0:
            raise UserError(f"diffusion.vlb_weight is {self.vlb_weight}; it must be 0 or more (the paper uses 0.1)")
        if self.target == "z_prev" and self.vlb_weight == 0:
            raise UserError(
                "diffusion.vlb_weight is 0 with diffusion.target z_prev, which has no residual term: nothing would be "
                "trained; set vlb_weight above 0, or target to flip or z0"
            )
        if self.target == "z_prev" and self.balance != "none":
            raise UserError(
                f"diffusion.balance is {self.balance} with diffusion.target z_prev, which has no residual term to "
                "balance; set balance to none, or target to flip or z0"
            )
        count = len(self.betas)
        if self.schedule == "betas" and count != self.steps:
            raise UserError(
                f"diffusion.betas are {count}; the schedule betas takes diffusion.steps ({self.steps}) values"
            )
        if self.schedule != "betas" and count:
            raise UserError(
                f"diffusion.betas are given, but diffusion.schedule is {self.schedule}, which does not read them; set "
                "schedule to betas, or leave betas out"
            )
        self.make_schedule()  # refuses betas that are no schedule

    def make_schedule(self) -> NoiseSchedule:
        """The schedule that this configuration names."""
        if self.schedule == "betas":
            return schedule_from_betas(self.betas)
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
    k = torch.as_tensor(k_t, dtype=torch.float64)  # a float stays on the CPU: a GPU need not wait for it
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


def to_evidence(output: Tensor, z_t: Tensor, k_s: Scalar, k_t: Scalar, target: Target) -> Tensor:
    """Table 7: the evidence e that the network's output stands for.

    flip:   e = output
    z0:     e = (1 - 2 z_t) output, for the output is the log-odds of z_0 = 1 from the other bits
    z_prev: the e of which r A + (1 - r) B = sigmoid(output), the exact reverse step from t to s = t - 1 read backwards;
            outside [B, A], where no posterior can be, the e of the nearer end

    Args:
        output: of the network at t, logits.
        z_t: the code that it saw.
        k_s: signal at t - 1; only z_prev reads it.
        k_t: signal at t; only z_prev reads it.
        target: of the network.

    Returns:
        Evidence logits, shaped like the output.
    """
    if target == "flip":
        return output
    if target == "z0":
        return (1 - 2 * z_t) * output
    flipped, clean = flip_given_residual(k_s, k_t)
    r = (torch.sigmoid(output.double()) - clean) / (flipped - clean)
    logit_r = torch.logit(r, eps=_CERTAIN)
    return (logit_r - calibrate(torch.zeros_like(logit_r), k_t)).to(output.dtype)


def network_output(
    denoiser: Denoiser, z_t: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None
) -> Tensor:
    """The output at z_t; where there is a mask of known tokens, bool (B, N), the denoiser takes it as 4th argument."""
    if known is None:
        return denoiser(z_t, time, labels)
    return cast("Callable[..., Tensor]", denoiser)(z_t, time, labels, known)


def evidence_network(denoiser: Denoiser, schedule: NoiseSchedule, target: Target) -> Denoiser:
    """Table 7: a network of any target as an evidence network, (z_BNC, t/T, labels) -> evidence logits.

    Like the network itself, it takes a mask of known tokens as fourth argument, where there is one.
    """
    if target == "flip":
        return denoiser

    def evidence(z_t: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None = None) -> Tensor:
        t = (time * schedule.steps).round().long()
        output = network_output(denoiser, z_t, time, labels, known)
        return to_evidence(output, z_t, *_signals(schedule, t - 1, t, z_t), target)

    return evidence


def check_grid(grid: Sequence[int], schedule: NoiseSchedule, target: Target) -> None:
    """Whether a network of this target can take the steps of a grid.

    Raises:
        UserError: the grid skips steps, and the target is z_prev.
    """
    if target == "z_prev" and len(grid) - 1 != schedule.steps:
        raise UserError(
            f"{len(grid) - 1} sampling steps asked for with diffusion.target z_prev, whose network knows single steps "
            f"from t to t - 1 only: take all T = {schedule.steps} steps, or train with target flip or z0"
        )


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
    a, b = _posterior(k_s, k_t, evidence)
    log_a, log_b, log_not_a, log_not_b = (x.to(evidence.dtype) for x in (a.log(), b.log(), (-a).log1p(), (-b).log1p()))
    log_change = torch.logaddexp(log_r + log_a, log_clean + log_b)
    log_stay = torch.logaddexp(log_r + log_not_a, log_clean + log_not_b)
    return _posterior_kl(flip, a, b, log_change, log_stay)


def previous_loss(output: Tensor, flip: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eq. 7 for target z_prev: KL(Bern(f ? A : B) || Bern(sigmoid(output))) for each bit, in nats; s = t - 1."""
    a, b = _posterior(k_s, k_t, output)
    return _posterior_kl(flip, a, b, F.logsigmoid(output), F.logsigmoid(-output))


def _posterior(k_s: Scalar, k_t: Scalar, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in float64, on a tensor's device."""
    a, b = flip_given_residual(k_s, k_t)
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


def corrupt(z_0: Tensor, k_t: Scalar, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: draw z_t ~ q(z_t | z_0) with the uniforms u; returns (z_t, flip = z_t XOR z_0)."""
    z_t = (u < transition(z_0, 1.0, k_t)).to(z_0.dtype)
    return z_t, (z_t - z_0).abs()


def _signals(schedule: NoiseSchedule, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """k_s and k_t, float64, shaped to broadcast over the codes `like`."""
    k = schedule.k.to(like.device)
    k_s, k_t = (k[i].view(-1, *[1] * (like.ndim - 1)) for i in (s, t))
    return k_s, k_t


def _corrupt_unknown(z_0: Tensor, k_t: Tensor, u: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """`corrupt`, but known tokens stay clean in z_t; what `flip` says of them does not count."""
    z_t, flip = corrupt(z_0, k_t.to(z_0.dtype), u)
    return (z_t if known is None else torch.where(known[..., None], z_0, z_t)), flip


def diffusion_terms(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    t: Tensor,
    u: Tensor,
    schedule: NoiseSchedule,
    balance: Literal["none", "flip"] = "none",
    s: Tensor | None = None,
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
        s: int64 (B,), values 0..t-1: where the step of L_vlb ends; None is t - 1.
        known: bool (B, N), tokens that stay clean, are marked to the denoiser and do not count; None: all count.

    Returns:
        (residual, vlb), each (B,), in nats a bit.
    """
    k_s, k_t = _signals(schedule, t - 1 if s is None else s, t, z_0)
    z_t, flip = _corrupt_unknown(z_0, k_t, u, known)
    evidence = network_output(denoiser, z_t, (t / schedule.steps).to(z_0.dtype), labels, known).float()
    residual = (balanced_residual_loss if balance == "flip" else residual_loss)(evidence, flip, k_t)
    return _mean_of_unknown(residual, known), _mean_of_unknown(vlb_loss(evidence, flip, k_s, k_t), known)


def _mean_of_unknown(loss: Tensor, known: Tensor | None) -> Tensor:
    """A loss of each bit -> its mean over each sample's unknown tokens, (B,)."""
    if known is None:
        return loss.flatten(1).mean(1)
    return loss.mean(-1).masked_fill(known, 0).sum(1) / (~known).sum(1)


def previous_term(
    denoiser: Denoiser,
    z_0: Tensor,
    labels: Tensor | None,
    t: Tensor,
    u: Tensor,
    schedule: NoiseSchedule,
    known: Tensor | None = None,
) -> Tensor:
    """L_vlb of a network of target z_prev, as `diffusion_terms` has it; L_residual has no meaning there.

    The output is scored as it stands: read as evidence, it would have no gradient outside [B, A].
    """
    k_s, k_t = _signals(schedule, t - 1, t, z_0)
    z_t, flip = _corrupt_unknown(z_0, k_t, u, known)
    output = network_output(denoiser, z_t, (t / schedule.steps).to(z_0.dtype), labels, known).float()
    return _mean_of_unknown(previous_loss(output, flip, k_s, k_t), known)


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
        denoiser: network of the target in `config`.
        z_0: clean code, float 0/1, (B, N, C).
        labels: int64 (B,) or None.
        index: int64 (B,): the global sample index, on which t and the flips are keyed.
        schedule: of the noise.
        config: the target, lambda and the residual loss.
        seed: of t and the flips.
        known: bool (B, N), as in `diffusion_terms`.

    Returns:
        {"loss", "residual", "vlb"}: scalars, in nats a bit. Target z_prev has no "residual": L = lambda L_vlb.
    """
    t = 1 + (uniform(seed, "diffusion time", index, 1)[:, 0] * schedule.steps).long()
    u = uniform(seed, "diffusion flips", index, math.prod(z_0.shape[1:])).view(z_0.shape)
    if config.target == "z_prev":
        vlb = previous_term(denoiser, z_0, labels, t, u, schedule, known).mean()
        return {"loss": config.vlb_weight * vlb, "vlb": vlb}
    network = evidence_network(denoiser, schedule, config.target)
    terms = diffusion_terms(network, z_0, labels, t, u, schedule, config.balance, known=known)
    residual, vlb = (x.mean() for x in terms)
    return {"loss": residual + config.vlb_weight * vlb, "residual": residual, "vlb": vlb}
