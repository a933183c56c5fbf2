"""Optuna's sampler as a function of (seed, number of the trial) and of the trials before, not of a state."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from bld_core.splitmix import key_of


class SeededSampler(BaseSampler):
    """TPE that draws the same trial after an interruption as without one."""

    def __init__(self, seed: int) -> None:
        self._seed, self._number = seed, -1
        self._sampler = TPESampler()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Optuna's first question of a trial."""
        if trial.number != self._number:
            self._number = trial.number
            self._sampler = TPESampler(seed=key_of(self._seed, trial.number) % 2**32)
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, for TPE draws each field by itself."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value of one field."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)
