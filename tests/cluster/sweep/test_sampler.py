"""Optuna's draws, without its state."""

from __future__ import annotations

import optuna

from cluster.sweep.sampler import SeededSampler


def drawn(count: int, before: list[optuna.trial.FrozenTrial], seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study that begins with some finished ones."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=SeededSampler(seed))
    study.add_trials(before)
    for _ in range(count - len(before)):
        trial = study.ask()
        x, y = trial.suggest_float("x", 1e-4, 1e-2, log=True), trial.suggest_categorical("y", ["a", "b"])
        study.tell(trial, x + (y == "a"))
    return study.trials


def test_a_search_that_was_interrupted_draws_what_one_draws_that_was_not() -> None:
    whole = drawn(14, [])
    again = drawn(14, drawn(12, []))  # TPE looks at the trials before from the 11th on
    assert [trial.params for trial in again] == [trial.params for trial in whole]
    assert len({trial.params["x"] for trial in whole}) == 14
    assert [trial.params for trial in drawn(2, [], seed=1)] != [trial.params for trial in whole[:2]]
