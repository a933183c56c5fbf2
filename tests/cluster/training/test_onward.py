"""Trainings that begin where a shorter one is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bld_core.errors import UserError
from bld_core.training.checkpoint import read_model_config
from cluster.config.experiment import Experiment
from cluster.training.onward import shared_checkpoint
from cluster.training.train import train_prior
from tests.cluster.training.test_train import curve_of


@pytest.fixture(scope="module")
def shorter(finished: Experiment) -> Experiment:
    """Half of the finished prior's training."""
    training = replace(finished.prior_training, steps=10, checkpoint_every=4)
    short = finished.variant("onward", "short", prior_training=training)
    train_prior(short, source=finished.folder)
    return short


def test_a_training_that_goes_on_from_a_shorter_one_ends_with_the_weights_of_one_that_did_not(
    shorter: Experiment, finished: Experiment
) -> None:
    whole = read_model_config(f"{finished.folder}/prior/final")
    longer = finished.variant("onward", "longer")
    train_prior(longer, source=finished.folder, start=shorter.folder)
    found = read_model_config(f"{longer.folder}/prior/final")
    assert (found["hash"], found["metrics"]) == (whole["hash"], whole["metrics"])
    assert [step for step, _ in curve_of(longer, "prior")] == [*range(11, 21)]


def test_only_a_checkpoint_that_the_longer_training_would_come_by_is_taken(
    shorter: Experiment, finished: Experiment
) -> None:
    def found(steps: int = 20, **fields: object) -> str:
        training = replace(shorter.prior_training, steps=steps, **fields)
        return shared_checkpoint(replace(shorter, prior_training=training), "prior", shorter.folder, 10)[-2:]

    assert [found(), found(10), found(9)] == ["10", "10", "08"]
    assert [found(decay=decay) for decay in ("linear", "cosine", "trapezoid")] == ["", "", "08"]
    assert found(ema_lengths=[0.1]) == ""
    for change, message in [
        ({"learning_rate": 1e-3}, r"other settings.*\n  prior_training.learning_rate: 0.002 -> 0.001\nset them"),
        ({"steps": 3}, "no checkpoint that a training of 3 steps would come by"),
    ]:
        other = finished.variant("onward", "other", prior_training=replace(finished.prior_training, **change))
        with pytest.raises(UserError, match=message):
            train_prior(other, source=finished.folder, start=shorter.folder)
    with pytest.raises(UserError, match="no-such/prior', which --start_from names, holds no training"):
        train_prior(other, source=finished.folder, start=f"{finished.folder}/no-such")
