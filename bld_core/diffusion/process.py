"""The Bernoulli diffusion of binary codes (Section 4): one function per equation.

Words and letters, here and in the files beside this one:
    z_t: the code at noise level t, z_BNC: B samples, N tokens, C bits a token, values 0 or 1.
    k_t, k_s: the schedule's signal at t and at an earlier level s < t; a float, or a tensor that broadcasts.
    flip: f = z_t XOR z_0; a bit of z_t is flipped if it differs from the clean one.
    r: the posterior *probability* that a bit is flipped, given all of z_t, that bit too.
    evidence: e, the log-odds that the clean bit is the opposite of the bit seen in z_t, given the *other* bits of z_t
        (the cavity). `calibrate` adds the likelihood of the seen bit itself, and gives logit r.
    target: what the network's output stands for (Table 7); `DiffusionProcess.evidence` turns it into evidence.
    group: g neighbouring bits of a token that are judged jointly; `groups.py` says how. 1 is the paper.
    known: tokens that are given, clean, and told to the network, bool (B, N); None where none are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from bld_core.diffusion.schedule import NoiseSchedule, ScheduleName, make_schedule, schedule_from_betas
from bld_core.errors import UserError

Scalar = float | Tensor
Target = Literal["flip", "z0", "z_prev"]
Calibration = Literal["bayes", "none"]
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (z_BNC, t/T of shape (B,), labels) -> its output


class Evidence(NamedTuple):
    """What the network says of z_t, whatever its target.

    bits: e, (B, N, C).
    residual: R, (B, N, C / g, 2^g): what it adds to the value v of each group of g bits; None where g = 1.
    """

    bits: Tensor
    residual: Tensor | None = None


@dataclass(frozen=True)
class DiffusionProcess:
    """How codes are noised, and what the network that undoes it predicts.

    Attributes:
        schedule: the signal that is left at each noise level.
        target: what the network's output stands for (Table 7).
        calibration: whether that is judged from the other bits, or from all of z_t.
        group: bits that are judged jointly; it divides the bits of a token.
    """

    schedule: NoiseSchedule
    target: Target = "z0"
    calibration: Calibration = "bayes"
    group: int = 1

    def evidence(self, output: Tensor, z_t: Tensor, k_t: Scalar) -> Evidence:
        """Table 7: what the network's output o says.

        flip:       the bits' part of it is the evidence: e = o.
        z0, z_prev: it is the log-odds of z_0 = 1, given the other bits: e = (1 - 2 z_t) o.
        Without calibration both are said given all bits, so that e is the one whose logit r they are.

        Args:
            output: of the network at t, (B, N, C); with groups (B, N, `output_size`), R behind the bits' part.
            z_t: the code that the network saw.
            k_t: signal at t.
        """
        C = z_t.shape[-1]
        e = output[..., :C] if self.target == "flip" else (1 - 2 * z_t) * output[..., :C]
        if self.calibration == "none":
            e = e - own_evidence(k_t, e)
        residual = output[..., C:].unflatten(-1, (C // self.group, -1)) if self.group > 1 else None
        return Evidence(e, residual)


def output_size(bits: int, group: int) -> int:
    """How many numbers a network gives for a token of so many bits: one a bit and, for g > 1, one a group's value."""
    return bits if group == 1 else bits + bits // group * 2**group


@dataclass(frozen=True)
class CodeBatch:
    """Clean codes with their classes and their numbers.

    Attributes:
        z_0: 0/1, (B, N, C).
        labels: int64 (B,) class indices, -1 for none; or None.
        index: int64 (B,): the number of each code, on which its noise is keyed.
    """

    z_0: Tensor
    labels: Tensor | None
    index: Tensor

    @staticmethod
    def numbered(z_0: Tensor, labels: Tensor | None = None, first: int = 0) -> CodeBatch:
        """Codes with the numbers `first`, `first` + 1, and so on."""
        return CodeBatch(z_0, labels, torch.arange(len(z_0), device=z_0.device) + first)

    def __len__(self) -> int:
        return len(self.z_0)

    def slice(self, start: int, stop: int) -> CodeBatch:
        """The codes at positions `start` to `stop` (exclusive)."""
        some = slice(start, stop)
        return CodeBatch(self.z_0[some], None if self.labels is None else self.labels[some], self.index[some])


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Bernoulli diffusion (Section 4), of prior.model binary; the other models do not read it.

    Args:
        steps: T, the number of noise levels in training.
        schedule: how the signal k_t falls with t/T; "betas" takes it from `betas`.
        betas: flip rates beta_1..beta_T in (0, 1], one for each step, for the schedule "betas" alone; the signal that
            they leave at T may be 0.001 at most.
        target: what the network predicts (Table 7): "z0", the clean bit; "flip", whether a bit differs from the clean
            one, which at its best says the same and is learned more slowly; "z_prev", the clean bit, too, but trained
            by the variational term alone, as the paper has it.
        calibration: "bayes" has the network judge a bit from the other bits, and adds what the bit itself says in
            closed form; "none" is the paper's own reading: the network judges it from all bits, and learns that, too.
        vlb_weight: lambda of Eq. 13, the weight of the variational term beside the residual term; 0 gives it no weight.
            Target z_prev does not read it.
        balance: "flip" balances the two classes of the residual term, which gives low noise levels less weight.
    """

    steps: int = 64
    schedule: ScheduleName = "linear"
    betas: list[float] = field(default_factory=list)
    target: Target = "z0"
    calibration: Calibration = "bayes"
    vlb_weight: float = 0.1
    balance: Literal["none", "flip"] = "none"

    def __post_init__(self) -> None:
        if not 4 <= self.steps <= 1024:
            raise UserError(f"`steps` is {self.steps}; it must be 4..1024 (the paper uses 64)", self)
        if self.vlb_weight < 0:
            raise UserError(f"`vlb_weight` is {self.vlb_weight}; it must be 0 or more (the paper uses 0.1)", self)
        if self.target == "z_prev" and self.balance != "none":
            raise UserError(
                f"`balance` is {self.balance} with `target` z_prev, which has no residual term to balance; set balance "
                "to none, or target to flip or z0",
                self,
            )
        count = len(self.betas)
        if self.schedule == "betas" and count != self.steps:
            raise UserError(f"`betas` are {count}; the schedule betas takes `steps` ({self.steps}) values", self)
        if self.schedule != "betas" and count:
            raise UserError(
                f"`betas` are given, but `schedule` is {self.schedule}, which does not read them; set schedule to "
                "betas, or leave betas out",
                self,
            )
        self.make_process()  # refuses betas that are no schedule

    def make_process(self, group: int = 1) -> DiffusionProcess:
        """The process that this configuration names, for a network that judges groups of so many bits."""
        betas = self.schedule == "betas"
        schedule = schedule_from_betas(self.betas) if betas else make_schedule(self.schedule, self.steps)
        return DiffusionProcess(schedule, self.target, self.calibration, group)


def transition(z_s: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Eqs. 4, 5: q(z_t = 1 | z_s) = 1/2 + (k_t / k_s) (z_s - 1/2), as probabilities.

    s = 0 is the marginal (Eq. 5), s = t - 1 the single step (Eq. 4); z_s may itself be a probability,
    so that transitions compose.
    """
    return 0.5 + (k_t / k_s) * (z_s - 0.5)


def corrupt(z_0: Tensor, k_t: Scalar, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: draw z_t ~ q(z_t | z_0) with the uniforms u; returns (z_t, flip = z_t XOR z_0)."""
    z_t = (u < transition(z_0, 1.0, k_t)).to(z_0.dtype)
    return z_t, (z_t - z_0).abs()


def own_evidence(k_t: Scalar, like: Tensor) -> Tensor:
    """log((1 - k_t) / (1 + k_t)): what a bit of z_t says of its own flip, as noise flips it with (1 - k_t) / 2."""
    k = torch.as_tensor(k_t, dtype=torch.float64)  # a float stays on the CPU: a GPU need not wait for it
    return (torch.log1p(-k) - torch.log1p(k)).to(like.dtype)


def calibrate(evidence: Tensor, k_t: Scalar) -> Tensor:
    """Bayes' rule, logits in and logits out: logit r = e + log((1 - k_t) / (1 + k_t)).

    Posterior odds are the odds from the other bits, e, times the likelihood ratio of the bit itself. That ratio is
    known in closed form, so it is added and not learned.
    """
    return evidence + own_evidence(k_t, evidence)


def reverse_flip_coefficients(k_s: Scalar, k_t: Scalar) -> tuple[Scalar, Scalar]:
    """A and B of the exact reverse step: P(z_s != z_t | z_t, z_0) for a bit that is flipped at t, and for a clean one.

    A = beta (1 + k_s) / (2 (1 - k_t)): z_t != z_0; did the bit flip between s and t?
    B = beta (1 - k_s) / (2 (1 + k_t)): z_t = z_0; did it flip before s, and back between s and t?
    where beta = 1 - k_t / k_s.
    """
    beta = 1 - k_t / k_s
    return beta * (1 + k_s) / (2 * (1 - k_t)), beta * (1 - k_s) / (2 * (1 + k_t))


def exact_coefficients(k_s: Scalar, k_t: Scalar, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as float64 probabilities, on a tensor's device: of small ones the logarithm is wanted, and of 1 - A."""
    a, b = reverse_flip_coefficients(k_s, k_t)
    return (
        torch.as_tensor(a, dtype=torch.float64, device=like.device).clamp(0, 1),
        torch.as_tensor(b, dtype=torch.float64, device=like.device).clamp(0, 1),
    )


def reverse_flip_probability(r: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """Exact reverse step (in place of Eq. 10): P(z_s != z_t | z_t) = r A + (1 - r) B, for any s < t.

    Args:
        r: posterior probability that each bit of z_t is flipped.
        k_s: signal at s.
        k_t: signal at t.

    Returns:
        Probability, shaped like r, that the bit changes between t and s. At s = 0 it is r itself.
    """
    A, B = reverse_flip_coefficients(k_s, k_t)
    return r * A + (1 - r) * B


def network_output(
    denoiser: Denoiser, z_t: Tensor, time: Tensor, labels: Tensor | None, known: Tensor | None
) -> Tensor:
    """The output at z_t. Where tokens are known, their mask is the denoiser's fourth argument."""
    if known is None:
        return denoiser(z_t, time, labels)
    return cast("Callable[..., Tensor]", denoiser)(z_t, time, labels, known)
