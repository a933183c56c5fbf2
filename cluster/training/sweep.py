"""Ray Tune: a sweep of lambda and schedule over the cached latents, compared by the likelihood bound."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ray.tune
import yaml
from ray.tune import RunConfig, TuneConfig, Tuner

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.trained import read_prior
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.console import aligned
from cluster.nodes import nodes_watched
from cluster.ray_private import keep_keys_from_tune
from cluster.runtime import connect_ray, unwrap
from cluster.stages import end_killed
from cluster.storage import run_storage
from cluster.tracking.store import known_to_be_there, open_client
from cluster.training.train import train_prior


class Trial(NamedTuple):
    """A trial of the sweep.

    Attributes:
        trial: its name.
        vlb_weight: lambda.
        schedule: of the noise.
        bound: likelihood bound, bits a bit.
        bound_se: its standard error.
    """

    trial: str
    vlb_weight: float
    schedule: str
    bound: float
    bound_se: float


def sweep_prior(experiment: Experiment, fresh: bool = False) -> list[Trial]:
    """Train a short prior for every combination of `sweep`; <folder>/sweep/table.json and best.yaml.

    Each trial is an experiment of its own in <folder>/sweep/<trial>, so a sweep that is run again resumes.

    Args:
        experiment: its configuration.
        fresh: start over, deleting the trials that were made before.

    Returns:
        The trials, the best first.

    Raises:
        MissingError: no encoded data set yet.
        UserError: bad input, before anything is started.
    """
    if experiment.prior.model != "binary":
        raise UserError(
            f"prior.model is {experiment.prior.model}, but lambda and the schedule are those of binary "
            "diffusion: sweep with prior.model binary"
        )
    open_encoded(experiment)
    trials = {trial.name: trial for trial in _trials(experiment)}
    uri, patience = experiment.tracking.resolve(experiment.root), experiment.tracking.patience
    open_client(uri, patience)  # asked, and a database made, before any trial
    connect_ray(experiment.cluster)
    keep_keys_from_tune()

    def run_trial(config: dict[str, Any]) -> None:
        known_to_be_there(uri)
        trial = trials[config["trial"]]
        train_prior(trial, source=experiment.folder)
        metrics = read_prior(trial.folder).metrics
        ray.tune.report({"bound": metrics["val_bound"], "bound_se": metrics["val_bound_se"]})

    folder = files.join(experiment.folder, "sweep")
    if fresh:
        files.remove(folder)
    tuner = Tuner(
        ray.tune.with_resources(run_trial, {"CPU": 0.01}),  # the training workers reserve their own
        param_space={"trial": ray.tune.grid_search(list(trials))},
        tune_config=TuneConfig(metric="bound", mode="min", max_concurrent_trials=experiment.sweep.concurrent),
        run_config=RunConfig(name="tune", **run_storage(folder), verbose=0),
    )
    try:
        with nodes_watched(experiment.cluster.need, experiment.cluster.patience):
            results = tuner.fit()
    finally:
        for trial in trials.values():
            end_killed(trial, "prior")  # a stopped sweep ends the processes of its trials at once
    if results.errors:
        for failure in map(unwrap, results.errors):
            if isinstance(failure, UserError):
                raise failure
        raise RuntimeError(f"{len(results.errors)} of {len(trials)} trials failed; the first: {results.errors[0]}")
    rows = [
        Trial(
            name := result.config["trial"],
            trials[name].diffusion.vlb_weight,
            trials[name].diffusion.schedule,
            result.metrics["bound"],
            result.metrics["bound_se"],
        )
        for result in results
        if result.config and result.metrics
    ]
    rows.sort(key=lambda trial: trial.bound)
    files.write_json(files.join(folder, "table.json"), {"rows": [trial._asdict() for trial in rows]})
    best = {"diffusion": {"vlb_weight": rows[0].vlb_weight, "schedule": rows[0].schedule}}
    files.write_bytes(files.join(folder, "best.yaml"), yaml.safe_dump(best).encode())
    return rows


def _trials(experiment: Experiment) -> list[Experiment]:
    sweep = experiment.sweep
    cluster = replace(experiment.cluster, workers=experiment.cluster.replicas)  # Tune's process is no place to train in
    return [
        experiment.variant(
            "sweep",
            f"lambda{weight:g}-{schedule}",
            diffusion=replace(experiment.diffusion, vlb_weight=weight, schedule=schedule),
            prior_training=replace(experiment.prior_training, steps=sweep.steps),
            cluster=cluster,
        )
        for weight, schedule in itertools.product(sweep.vlb_weights, sweep.schedules)
    ]


def sweep_table(trials: Sequence[Trial]) -> str:
    """The trials as lines of text, best first."""
    head = ("lambda", "schedule", "bound (bits a bit)")
    return "\n".join(
        aligned([head, *((f"{t.vlb_weight:g}", t.schedule, f"{t.bound:.4f} +- {t.bound_se:.4f}") for t in trials)])
    )
