"""The settings of the sweep; they are read where ray.tune itself is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from bld_core.diffusion.schedule import ScheduleName
from bld_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The sweep over prior training: every combination is one trial on the cached latents.

    Args:
        vlb_weights: values of diffusion.vlb_weight (lambda).
        schedules: values of diffusion.schedule.
        steps: training steps of each trial.
        concurrent: trials that run at the same time; together they must fit the cluster.
    """

    vlb_weights: list[float] = field(default_factory=lambda: [0.0, 0.1])
    schedules: list[ScheduleName] = field(default_factory=lambda: ["linear", "cosine"])
    steps: int = 10_000
    concurrent: int = 1

    def __post_init__(self) -> None:
        if not self.vlb_weights or not self.schedules:
            raise UserError("sweep.vlb_weights and sweep.schedules must each name at least one value")
        if self.steps < 1 or self.concurrent < 1:
            raise UserError(f"sweep.steps is {self.steps}, sweep.concurrent {self.concurrent}; both must be at least 1")
