"""Which trial comes next, and which ends early: Ray Tune's own parts, set up from the settings of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from bld_core.splitmix import key_of
from cluster.config.experiment import Experiment
from cluster.sweep.config import SweepConfig
from cluster.sweep.space import Values

STEP = "step"
"""What a trial reports beside its metric: training steps."""
_PLANNED = "values"


def scheduler(sweep: SweepConfig) -> TrialScheduler:
    """ASHA over the steps of evaluations, or nothing that ends a trial early."""
    if sweep.early_stopping == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=STEP,
        max_t=sweep.steps,
        grace_period=sweep.first_rung,
        reduction_factor=sweep.reduction,
        stop_last_trials=False,  # it would end trials at their last step, before their model is written
    )


def planned(trials: Sequence[Values]) -> dict[str, Any]:
    """Tune's space of trials whose values are known."""
    return {_PLANNED: ray.tune.grid_search([json.dumps(values) for values in trials])}


def domains(space: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's space of trials that are drawn one after the other; values of a list are JSON, whatever they are."""
    found: dict[str, Any] = {}
    for name, among in space.items():
        [(kind, bounds)] = among.items() if isinstance(among, dict) else [("choice", among)]
        draw = getattr(ray.tune, kind)
        found[name] = draw([json.dumps(value) for value in bounds]) if kind == "choice" else draw(*bounds)
    return found


def values_of(config: Mapping[str, Any]) -> Values:
    """The values of a trial, from its config as Tune has it."""
    if _PLANNED in config:
        return json.loads(config[_PLANNED])
    return {name: json.loads(value) if isinstance(value, str) else value for name, value in config.items()}


def optuna_search(experiment: Experiment, space: Mapping[str, Any], asked: Sequence[Values]) -> Searcher:
    """Tune's wrapper of Optuna, which first draws again what an earlier start has drawn.

    The space and the metric it has from Tune, as the scheduler has: `domains` are Tune's space.

    Args:
        experiment: its seed is that of the search.
        space: of the sweep.
        asked: values of the trials so far, in order: Optuna learns of them as they tell their evaluations again.
    """
    import optuna  # a second of a core
    from ray.tune.search.optuna import OptunaSearch

    from cluster.sweep.sampler import SeededSampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    choices = {name for name, among in space.items() if not isinstance(among, dict) or "choice" in among}
    points = [{name: json.dumps(v) if name in choices else v for name, v in values.items()} for values in asked]
    return OptunaSearch(
        sampler=SeededSampler(key_of(experiment.seed, "sweep")),
        points_to_evaluate=[point for point in points if point.keys() == space.keys()],
    )
