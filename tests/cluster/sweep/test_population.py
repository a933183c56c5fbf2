"""Populations: who goes on from whom, with which settings; and one as it runs."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.training.checkpoint import read_model_config
from cluster.config.experiment import Experiment
from cluster.sweep.config import SweepConfig
from cluster.sweep.page import write_sweep_report
from cluster.sweep.population import check_population, decide, decided, explored, generation
from cluster.sweep.run import sweep
from cluster.sweep.space import make_trial, settings_of
from cluster.sweep.table import Row
from cluster.training.checkpoints import newest_step
from cluster.training.history import Evaluated
from tests.conftest import copy_of

SPACE: dict[str, Any] = {
    "prior_training.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "diffusion.vlb_weight": [0.0, 0.1, 0.5],
}
POPULATION = Experiment(sweep=SweepConfig(space=SPACE, search="population", trials=8, generations=3, steps=30))


def rows_of(bounds: list[float]) -> list[Row]:
    """The rows of a first generation that has reached some bounds; a member without one has failed."""
    return [
        Row(
            trial=f"generation0-member{member}",
            values=values,
            outcome="finished" if bound else "failed",
            evaluations=[Evaluated(10, {"val_bound": bound})] if bound else [],
        )
        for member, (values, bound) in enumerate(zip(generation(POPULATION, "prior", 0, []), bounds, strict=True))
    ]


def test_the_worst_quarter_goes_on_from_the_best_with_settings_near_theirs() -> None:
    first = generation(POPULATION, "prior", 0, [])
    assert [(each["member"], each["parent"]) for each in first] == [(m, m) for m in range(8)]
    assert len({each["prior_training.learning_rate"] for each in first}) == 8
    rows = rows_of([0.5, 0.1, 0.6, 0.2, 0.3, 0.0, 0.4, 0.7])  # member 5 has failed
    second = generation(POPULATION, "prior", 1, rows)
    assert second == generation(POPULATION, "prior", 1, rows[::-1])
    parents = [each["parent"] for each in second]
    assert [parent for member, parent in enumerate(parents) if member not in (5, 7)] == [0, 1, 2, 3, 4, 6]
    assert {parents[5], parents[7]} <= {1, 3}
    for each in second:
        same = settings_of(each) == settings_of(first[each["parent"]])
        assert same == (each["member"] not in (5, 7))


def test_a_trial_of_a_generation_ends_where_the_next_begins() -> None:
    trials = [make_trial(POPULATION, "prior", {"generation": n, "member": 2, "parent": 1}).allowed for n in range(3)]
    assert [each.prior_training.steps for each in trials] == [10, 20, 30]
    assert [Path(each.folder).name for each in trials] == [f"generation{n}-member2" for n in range(3)]


@pytest.mark.parametrize(
    ("among", "value", "near"),
    [
        ({"loguniform": [1e-3, 1.0]}, 0.1, {0.12, 0.08333}),
        ({"uniform": [0.0, 1.0]}, 0.9, {1.0, 0.75}),
        ({"randint": [1, 9]}, 2, {1, 3}),
        ({"choice": ["a", "b", "c"]}, "b", {"a", "c"}),
        ([0.0, 0.1, 0.5], 0.1, {0.0, 0.5}),
    ],
)
def test_settings_move_to_a_neighbour_or_now_and_then_anywhere(among: Any, value: Any, near: set[Any]) -> None:
    seen = Counter(explored(among, value, key_of(n)) for n in range(400))
    assert all(seen[each] > 100 for each in near), "three quarters, half of them up"
    assert [explored([0.0, 0.1], 0.1, key_of(n)) for n in range(40)].count(0.0) > 30, (
        "from an end, to where there is room"
    )
    assert sum(count for each, count in seen.items() if each not in near) < 150
    if isinstance(among, dict) and "choice" not in among:
        [[low, high]] = among.values()
        assert all(low <= each <= high for each in seen)
        assert max(seen) > 0.7 * high, "what is drawn anew is drawn from all of it"


@pytest.mark.parametrize(
    ("training", "space", "message"),
    [
        ({}, {}, r"sweep.space is empty, but sweep.search is population"),
        ({}, {"prior.width": [32, 64]}, r"has prior.width, which only a new training can change.*prior_training.learn"),
        ({"decay": "cosine"}, SPACE, r"prior_training.decay is 'cosine': its rates .* set it to constant"),
        ({"ema_lengths": [0.1]}, SPACE, r"prior_training.ema_lengths, .* set ema_lengths to \[\]"),
    ],
)
def test_what_cannot_change_in_the_middle_is_refused(
    training: dict[str, Any], space: dict[str, Any], message: str
) -> None:
    settings, sweeps = replace(POPULATION.prior_training, warmup=2, **training), replace(POPULATION.sweep, space=space)
    with pytest.raises(ValueError, match=message):
        check_population(replace(POPULATION, prior_training=settings, sweep=sweeps), "prior")


@pytest.mark.parametrize("wrong", [{"trials": 1}, {"generations": 1}, {"generations": 31}, {"early_stopping": "asha"}])
def test_a_population_of_one_or_of_one_generation_is_refused(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=rf"sweep.{name} is "):
        replace(POPULATION.sweep, **wrong)


@pytest.mark.long
def test_a_population_that_is_interrupted_goes_on_to_the_same(encoded: Experiment, tmp_path: Path) -> None:
    """Two members, two generations: the worse one goes on from the better one's weights."""

    def experiment_in(folder: str) -> Experiment:
        root = copy_of(encoded, tmp_path / folder, "autoencoder", "latents")
        tracking = replace(encoded.tracking, uri=encoded.tracking.resolve(encoded.root), experiment=folder)
        settings = SweepConfig(space=SPACE, search="population", trials=2, generations=2, steps=12, concurrent=2)
        return replace(encoded, root=str(root), tracking=tracking, sweep=settings)

    whole, stopped = experiment_in("whole"), experiment_in("stopped")
    rows = sweep(whole)
    assert sorted(row.trial for row in rows) == [f"generation{n}-member{m}" for n in (0, 1) for m in (0, 1)]
    bounds = {row.trial: row.metrics["val_bound"] for row in rows}
    better = min((0, 1), key=lambda member: bounds[f"generation0-member{member}"])
    assert {row.values["parent"] for row in rows if row.values["generation"]} == {better}
    for row in rows:
        folder, number = Path(whole.folder, "sweep", row.trial, "prior"), row.values["generation"]
        assert newest_step(str(folder)) == 6 * (number + 1)
        assert min(folder.glob("checkpoint-*")).name == "checkpoint-0000006", "what it goes on from"
    assert rows[0].values["generation"] == 1, "who has learned longer has learned more"
    best = yaml.safe_load(Path(whole.folder, "sweep/best.yaml").read_text())
    assert best == {
        "prior_training": {"learning_rate": rows[0].values["prior_training.learning_rate"]},
        "diffusion": {"vlb_weight": rows[0].values["diffusion.vlb_weight"]},
    }
    assert "24 of 24 steps were trained" in Path(write_sweep_report(whole, "prior", rows, "x")).read_text()

    decide(stopped, "prior", decided(whole, "prior"))
    for row in rows:
        if not row.values["generation"]:  # it was stopped between the generations
            shutil.copytree(f"{whole.folder}/sweep/{row.trial}", f"{stopped.folder}/sweep/{row.trial}")
    assert sweep(stopped) == rows
    other = replace(stopped, sweep=replace(stopped.sweep, space=SPACE | {"diffusion.vlb_weight": [0.2]}))
    with pytest.raises(ValueError, match=r"is of a population with other settings.* with sweep.py --fresh"):
        sweep(other)
    for row in rows:
        finals = [f"{each.folder}/sweep/{row.trial}/prior/final" for each in (whole, stopped)]
        assert len({read_model_config(final)["hash"] for final in finals}) == 1
    one, two = (files.read_bytes(f"{each.folder}/sweep/table.json") for each in (whole, stopped))
    assert one == two
