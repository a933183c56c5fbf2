"""Ray Tune: a sweep of lambda and schedule over the cached latents, judged by the likelihood bound."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ray.tune
import yaml
from ray.tune import RunConfig, TuneConfig, Tuner

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.trained import read_prior
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.runtime import connect
from cluster.storage import run_storage
from cluster.training.train import train_prior


def sweep_prior(experiment: Experiment, fresh: bool = False) -> list[dict[str, Any]]:
    """Train a short prior for every combination of `sweep`; <folder>/sweep/table.json and best.yaml.

    Each trial is an experiment of its own in <folder>/sweep/<trial>, so a sweep that is run again resumes.

    Args:
        experiment: its configuration.
        fresh: start over, deleting the trials that were made before.

    Returns:
        One row a trial, best first: trial, vlb_weight, schedule, bound, bound_se.

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
    connect(experiment.cluster)

    def run_trial(config: dict[str, Any]) -> None:
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
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(trials)} trials failed; the first: {results.errors[0]}")
    rows = [
        {
            "trial": result.config["trial"],
            "vlb_weight": trials[result.config["trial"]].diffusion.vlb_weight,
            "schedule": trials[result.config["trial"]].diffusion.schedule,
            "bound": result.metrics["bound"],
            "bound_se": result.metrics["bound_se"],
        }
        for result in results
        if result.config and result.metrics
    ]
    rows.sort(key=lambda row: row["bound"])
    files.write_json(files.join(folder, "table.json"), {"rows": rows})
    best = {"diffusion": {name: rows[0][name] for name in ("vlb_weight", "schedule")}}
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


def table(rows: list[dict[str, Any]]) -> str:
    """The trials as lines of text, best first."""
    lines = ["lambda  schedule  bound (bits a bit)"]
    lines += [f"{r['vlb_weight']:<6g}  {r['schedule']:<8}  {r['bound']:.4f} +- {r['bound_se']:.4f}" for r in rows]
    return "\n".join(lines)
