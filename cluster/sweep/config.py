"""The settings of a sweep; they are read where ray.tune itself is not imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bld_core.diffusion.schedule import ScheduleName
from bld_core.errors import UserError

DRAWS = {"uniform": 2, "loguniform": 2, "randint": 2, "choice": 0}
"""The distributions of a field, and how many numbers each takes; `choice` takes any values."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: short trainings of one stage, the trials, each with other values of some fields.

    Args:
        space: the fields that differ, by their dotted names, each with a list of values, or with one of
            {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]}, whose high is not drawn, and
            {choice: [values]}. Empty takes the next two, for a sweep of the prior.
        vlb_weights: values of diffusion.vlb_weight (lambda), where space is empty.
        schedules: values of diffusion.schedule, where space is empty.
        search: "grid" tries every combination of the lists; "random" draws each trial by itself; "optuna" draws it by
            what the trials before have shown (TPE, Bergstra et al. 2011); "population" trains members side by side, of
            which the worst go on from the weights of the best, with other settings (Jaderberg et al. 2017).
        trials: of a random search, and of Optuna's; members of a population, of which equal ones learn the same.
        generations: of a population: parts of the training after each of which its members are compared.
        early_stopping: "asha" ends a trial whose evaluation at a rung is not among the best 1/reduction of those that
            came there before (Li et al. 2018); the rungs are grace, grace * reduction, and so on. "none" ends none.
        grace: steps of the first rung of ASHA; 0 takes steps / reduction^2.
        reduction: of ASHA.
        steps: training steps of each trial.
        concurrent: trials that run at the same time, where the cluster holds so many.
    """

    space: dict[str, Any] = field(default_factory=dict[str, Any])
    vlb_weights: list[float] = field(default_factory=lambda: [0.0, 0.1])
    schedules: list[ScheduleName] = field(default_factory=lambda: ["linear", "cosine"])
    search: Literal["grid", "random", "optuna", "population"] = "grid"
    trials: int = 16
    generations: int = 4
    early_stopping: Literal["none", "asha"] = "none"
    grace: int = 0
    reduction: int = 3
    steps: int = 10_000
    concurrent: int = 1

    def __post_init__(self) -> None:
        if not self.vlb_weights or not self.schedules:
            raise UserError("sweep.vlb_weights and sweep.schedules must each name at least one value")
        for name in ("steps", "concurrent", "trials"):
            if getattr(self, name) < 1:
                raise UserError(f"sweep.{name} is {getattr(self, name)}; it must be at least 1")
        if self.search == "population":
            self._check_population()
        if self.reduction < 2:
            raise UserError(f"sweep.reduction is {self.reduction}; it must be at least 2")
        if not 0 <= self.grace <= self.steps:
            raise UserError(
                f"sweep.grace is {self.grace}; it must be 0, or lie in 1..{self.steps}, which is sweep.steps"
            )
        for name, values in self.space.items():
            _check(name, values)
            if self.search == "grid" and not isinstance(values, list):
                raise UserError(
                    f"sweep.space has {name}: {values}, but sweep.search is grid, which tries every value of a list: "
                    "give a list, or set search to random, optuna or population"
                )

    def _check_population(self) -> None:
        if self.trials < 2:
            raise UserError(f"sweep.trials is {self.trials}; a population has at least 2 members")
        if not 2 <= self.generations <= self.steps:
            raise UserError(
                f"sweep.generations is {self.generations}; a population has at least 2, and at most as many as "
                f"sweep.steps, which is {self.steps}"
            )
        if self.early_stopping != "none":
            raise UserError(
                f"sweep.early_stopping is {self.early_stopping}, but sweep.search is population, which ends no member "
                "early: set it to none, or sweep.search to another"
            )

    @property
    def first_rung(self) -> int:
        """Steps after which ASHA may end a trial for the first time."""
        return self.grace or max(1, self.steps // self.reduction**2)


def _check(name: str, values: object) -> None:
    """Refuse what is neither a list of values nor a distribution."""
    if isinstance(values, list) and values:
        return
    kind, bounds = next(iter(values.items())) if isinstance(values, dict) and len(values) == 1 else ("", None)
    if kind in DRAWS and isinstance(bounds, list) and bounds and DRAWS[kind] in (0, len(bounds)):
        if kind == "choice":
            return
        whole = kind == "randint"
        numbers = [b for b in bounds if type(b) is int or (not whole and type(b) is float and math.isfinite(b))]
        if len(numbers) == 2 and numbers[0] < numbers[1] and (kind != "loguniform" or numbers[0] > 0):
            return
    raise UserError(
        f"sweep.space has {name}: {values}; it must be a list of values, or one of {{uniform: [low, high]}}, "
        "{loguniform: [low, high]} with low above 0, {randint: [low, high]} of whole numbers, each with low below "
        "high, and {choice: [values]}"
    )
