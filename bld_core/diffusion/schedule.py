"""Noise schedules: one number per step, k_t, from which everything else follows (Section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bld_core.errors import UserError

ScheduleName = Literal["linear", "cosine", "sigmoid", "betas"]

_SIGMOID_RANGE = 3.75
_LAST_K_LIMIT = 1e-3


@dataclass(frozen=True)
class NoiseSchedule:
    """The signal k_t that is left after t steps; b_t = (1 - k_t) / 2 for every schedule.

    Attributes:
        k: float64, (steps + 1,): k[0] = 1, strictly decreasing, k[steps] within 1e-3 of 0.
    """

    k: Tensor
    _on: dict[torch.device, Tensor] = field(default_factory=dict[torch.device, Tensor], init=False, compare=False)

    def __post_init__(self) -> None:
        k = self.k
        if k.dtype != torch.float64 or k.ndim != 1 or len(k) < 2:
            raise ValueError(
                f"k is {k.dtype} of shape {tuple(k.shape)}; a schedule is a float64 vector of steps + 1 >= 2 values"
            )
        if k[0] != 1 or bool((k.diff() >= 0).any()):
            raise ValueError("k must start at 1 and decrease at every step; check that every beta lies in (0, 1]")
        if not 0 <= k[-1] <= _LAST_K_LIMIT:
            raise ValueError(
                f"k ends at {float(k[-1]):.4g}; it must end within {_LAST_K_LIMIT} of 0, or sampling would start "
                "from the wrong distribution: use more steps or larger betas"
            )

    @property
    def steps(self) -> int:
        """T, the number of single steps."""
        return len(self.k) - 1

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """k_t for the level t of each sample, int64 (B,): float64, shaped to broadcast over the codes `like`."""
        if like.device not in self._on:  # copied once: each time would be a wait
            self._on[like.device] = self.k.to(like.device)
        return self._on[like.device][t].view(-1, *[1] * (like.ndim - 1))

    @cached_property
    def levels(self) -> list[float]:
        """k_0, ..., k_T on the host."""
        return self.k.tolist()

    def grid(self, count: int, spacing: Literal["k", "t"] = "k") -> list[int]:
        """The steps t that a sampler of `count` steps visits: decreasing, from T to 0.

        Args:
            count: number of sampling steps, 1..T.
            spacing: equal steps of "k" (the nearest t to each; ties are moved apart) or of "t" (the paper's).
        """
        if not 1 <= count <= self.steps:
            raise UserError(f"{count} sampling steps asked for; this prior was trained with T = {self.steps}: 1..T")
        if spacing == "t":
            ts = [round(self.steps * i / count) for i in range(count + 1)]
        else:
            targets = torch.linspace(1, 0, count + 1, dtype=torch.float64)
            ts = (self.k[None, :] - targets[:, None]).abs().argmin(dim=1).tolist()
            for i in range(1, count + 1):  # strictly increasing, leaving room for what follows
                ts[i] = min(max(ts[i], ts[i - 1] + 1), self.steps - (count - i))
        ts[0], ts[-1] = 0, self.steps
        return ts[::-1]


def _linear(u: float) -> float:
    return 1 - u


def _cosine(u: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * u)


def _sigmoid(u: float) -> float:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    end = logistic(_SIGMOID_RANGE)
    return (end - logistic(_SIGMOID_RANGE * u)) / (end - logistic(0))


_CURVES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}


def make_schedule(name: str, steps: int) -> NoiseSchedule:
    """A named schedule of T = `steps` steps: linear, cosine or sigmoid, as a function of t / T.

    linear:  k_t = 1 - t/T
    cosine:  k_t = 1/2 + 1/2 cos(pi t/T)
    sigmoid: k_t = (S(3.75) - S(3.75 t/T)) / (S(3.75) - S(0)), S the logistic function

    Raises:
        UserError: an unknown name, or fewer than one step.
    """
    if name not in _CURVES:
        raise UserError(f"schedule {name!r} is unknown; it must be one of {', '.join(_CURVES)}")
    if steps < 1:
        raise UserError(f"steps is {steps}; a schedule needs at least 1 step")
    curve = _CURVES[name]
    k = [curve(t / steps) for t in range(steps + 1)]
    k[0], k[-1] = 1.0, 0.0  # exact at both ends, whatever the rounding of cos and exp
    return NoiseSchedule(torch.tensor(k, dtype=torch.float64))


def schedule_from_betas(betas: Sequence[float]) -> NoiseSchedule:
    """k_t = prod_{i<=t} (1 - beta_i) for given flip rates beta_1..beta_T (Eq. 4).

    Raises:
        ValueError: the product does not end within 1e-3 of 0.
    """
    k = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), k]))
