"""The trials of a sweep, before any of them runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bld_core.errors import UserError
from cluster.config.experiment import Experiment
from cluster.sweep.config import SweepConfig
from cluster.sweep.space import draw, flags, make_trial, nested, planned_values, space_of, trial_name
from tests.conftest import small_experiment

SHARDS = {"train": "train.tar", "validation": "validation.tar"}


def experiment_of(tmp_path: Path, **sweep: Any) -> Experiment:
    return replace(small_experiment(tmp_path, SHARDS), sweep=SweepConfig(**sweep))


def test_a_grid_is_every_combination_and_the_default_space_is_named_as_ever(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    names = [trial_name(values) for values in planned_values(experiment, "prior")]
    assert names == ["lambda0-linear", "lambda0-cosine", "lambda0.1-linear", "lambda0.1-cosine"]
    trial = make_trial(
        experiment, "prior", {"diffusion.vlb_weight": 0.5, "prior.width": 64, "prior_training.warmup": 3}
    )
    changed = trial.allowed
    assert (changed.diffusion.vlb_weight, changed.prior.width, changed.prior_training.warmup) == (0.5, 64, 3)
    assert changed.folder == f"{experiment.folder}/sweep/lambda0.5-width64-warmup3"
    assert changed.prior_training.steps == experiment.sweep.steps


def test_draws_are_functions_of_their_key_and_follow_their_distribution() -> None:
    keys = range(4000)
    uniform = [draw({"uniform": [2.0, 4.0]}, key) for key in keys]
    assert uniform == [draw({"uniform": [2.0, 4.0]}, key) for key in keys]
    assert min(uniform) >= 2
    assert max(uniform) <= 4
    assert sum(uniform) / len(uniform) == pytest.approx(3, abs=4 * 2 / math.sqrt(12 * len(uniform)))
    logs = [math.log10(draw({"loguniform": [1e-4, 1e-2]}, key)) for key in keys]
    assert sum(logs) / len(logs) == pytest.approx(-3, abs=4 * 2 / math.sqrt(12 * len(logs)))
    assert {draw({"randint": [2, 5]}, key) for key in keys} == {2, 3, 4}
    assert {draw({"choice": ["a", 1]}, key) for key in keys} == {draw(["a", 1], key) for key in keys} == {"a", 1}


def test_a_random_search_is_the_same_at_each_start_and_more_trials_go_on_with_it(tmp_path: Path) -> None:
    space = {"prior_training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "diffusion.target": ["flip", "z0"]}
    few, many = (experiment_of(tmp_path, space=space, search="random", trials=n) for n in (4, 9))
    assert planned_values(many, "prior")[:4] == planned_values(few, "prior")
    assert planned_values(replace(many, seed=1), "prior") != planned_values(many, "prior")
    names = [trial_name(values) for values in planned_values(many, "prior")]
    assert len({*names}) == 9


def test_names_tell_trials_apart_whatever_their_values() -> None:
    values = [0.1, 0.1 + 1e-12, "a/b", "ab", [], ["rope"], ["rope", "swiglu"], None, "x" * 200, "x" * 201]
    names = [trial_name({"prior.trunk": value}) for value in values]
    assert len({*names}) == len(names)
    assert [name for name in names if "/" in name or len(name) > 100] == []


def test_settings_that_the_experiment_refuses_are_a_trial_that_says_so(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    for values, why in [
        ({"prior.width": 33}, "prior.width|width is 33"),
        ({"prior.width": "wide"}, "prior.width is 'wide': "),
        ({"diffusion.schedule": "lineer"}, "diffusion.schedule is 'lineer': "),
        ({"prior.group": 8, "diffusion.balance": "batch"}, "balance"),
    ]:
        trial = make_trial(experiment, "prior", values)
        assert trial.experiment is None
        with pytest.raises(UserError, match=why):
            _ = trial.allowed


@pytest.mark.parametrize(
    ("stage", "space", "message"),
    [
        ("prior", {"prior.layer": [1]}, r"no field of prior, diffusion.*the nearest is prior\.layers"),
        ("prior", {"autoencoder.bits": [8]}, r"autoencoder\.bits, which is no field of prior"),
        ("autoencoder", {}, r"sweep\.space is empty: name the fields of stage 1"),
    ],
)
def test_fields_that_the_stage_does_not_have_are_refused(
    tmp_path: Path, stage: Any, space: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        space_of(experiment_of(tmp_path, space=space), stage)


@pytest.mark.parametrize(
    "values",
    [
        *([], 3, {"normal": [0, 1]}, {"choice": []}, {"uniform": [0, 1], "choice": [1]}),
        *({"uniform": [1]}, {"uniform": [2, 1]}, {"uniform": [0, math.inf]}, {"uniform": ["a", "b"]}),
        *({"loguniform": [0, 1]}, {"randint": [0, 1.5]}),
    ],
)
def test_what_is_no_distribution_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match=r"sweep\.space has prior\.width: .*must be a list of values"):
        SweepConfig(space={"prior.width": values}, search="random")


def test_a_grid_takes_no_distribution() -> None:
    with pytest.raises(UserError, match=r"sweep\.search is grid.*set search to random, optuna or population"):
        SweepConfig(space={"prior.width": {"randint": [1, 3]}})


def test_the_best_values_are_settings_and_flags() -> None:
    values = {"prior.width": 64, "prior.trunk": ["rope"], "diffusion.schedule": "cosine", "diffusion.vlb_weight": 0.1}
    assert nested(values) == {
        "prior": {"width": 64, "trunk": ["rope"]},
        "diffusion": {"schedule": "cosine", "vlb_weight": 0.1},
    }
    assert flags(values)[1:3] == ['--prior.trunk=["rope"]', "--diffusion.schedule=cosine"]
