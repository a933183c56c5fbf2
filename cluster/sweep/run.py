"""Ray Tune: a sweep of one stage, each trial an experiment of its own, which goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.tune
import yaml
from ray.exceptions import RayActorError
from ray.tune import FailureConfig, PlacementGroupFactory, ResultGrid, RunConfig, TuneConfig, Tuner

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.storage.records import read_record, write_record
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.data.check import check_data
from cluster.nodes.placement import cluster_has, nodes_there, rooms
from cluster.nodes.watch import check_access, died, nodes_watched
from cluster.ray_private.data import begin_stats
from cluster.ray_private.tune import keep_keys_from_tune, reporter_for_others
from cluster.runtime import ClusterConfig, connect_ray, unwrap
from cluster.stages import end_killed, locked
from cluster.storage import run_storage
from cluster.sweep.board import Board, was_stopped
from cluster.sweep.population import check_population, decide, decided, generation
from cluster.sweep.search import STEP, domains, optuna_search, planned, scheduler, values_of
from cluster.sweep.space import (
    GOALS,
    StageName,
    Trial,
    Values,
    make_trial,
    nested,
    parent_of,
    planned_values,
    space_of,
)
from cluster.sweep.table import Row, finished, ranked, read_row, sweep_table, table_json
from cluster.tracking.runs import Run, start_run, trial_run
from cluster.tracking.store import known_to_be_there, open_client
from cluster.training.checkpoints import checkpoints
from cluster.training.history import read_history
from cluster.training.onward import shared_checkpoint
from cluster.training.train import train_autoencoder, train_prior

_RECORD = "sweep.json"
_TRIES = 1  # more of a trial that has failed, from its checkpoint
# A trial that is ended early writes a checkpoint to its end, and tells MLflow. Tune would give it 2 s, and then count
# the next trial, which is to have its process, as failed.
_PATIENCE = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "600"}


@dataclass(frozen=True)
class Teller:
    """Tells Tune of each evaluation but the last, which the trial tells itself, once its model is written.

    Attributes:
        report: Tune's.
        metric: that it compares trials by.
        steps: of the whole trial.
    """

    report: Callable[[dict[str, Any]], None]
    metric: str
    steps: int

    def __call__(self, metrics: dict[str, float]) -> None:
        if metrics[STEP] < self.steps:
            self.report({name: metrics[name] for name in (STEP, self.metric)})


def sweep(experiment: Experiment, stage: StageName = "prior", fresh: bool = False) -> list[Row]:
    """Train a short stage for every trial; <folder>/sweep/table.json, table.txt and best.yaml.

    Each trial is an experiment of its own in <folder>/sweep/<trial>, so a sweep that is run again goes on: finished
    trials stay, others continue from their checkpoints, and all tell again what they told before.

    Args:
        experiment: its configuration.
        stage: that is trained. Trials of stage 1 lie in <folder>/sweep-autoencoder.
        fresh: start over, deleting the trials that were made before.

    Returns:
        The trials, the best first.

    Raises:
        MissingError: a sweep of the prior, and no encoded data set yet.
        UserError: bad input, before anything is started; or no trial has succeeded, for the reason of the first.
    """
    space, goal = space_of(experiment, stage), GOALS[stage]
    if experiment.sweep.search == "population":
        check_population(experiment, stage)
        if not fresh:
            decided(experiment, stage)
    known = [make_trial(experiment, stage, values) for values in _values(experiment, stage)]
    if known and all(trial.experiment is None for trial in known):
        raise UserError(f"every trial of the sweep is refused; the first, {known[0].name}: {known[0].why}")
    reads: list[str] = []
    if stage == "prior":
        open_encoded(experiment)
    else:
        reads = check_data(experiment).train[:1]
    uri, patience = experiment.tracking.resolve(experiment.root), experiment.tracking.patience
    open_client(uri, patience)  # asked, and a database made, before any trial
    folder = files.join(experiment.folder, goal.folder)
    with locked(folder):
        if fresh:
            files.remove(folder)
        connect_ray(experiment.cluster.of_work(decodes=stage == "autoencoder"), many=True)
        if experiment.cluster.joined:
            check_access([experiment.folder, *reads])
        if stage == "autoencoder" and experiment.cluster.decode_tasks:
            begin_stats()
        run = _open_run(experiment, goal.folder, folder)
        with run.until_end():
            return _run(experiment, stage, space, known, run)


def _values(experiment: Experiment, stage: StageName) -> list[Values]:
    """What is known of the trials before any of them begins."""
    if experiment.sweep.search == "population":
        return generation(experiment, stage, 0, [])
    return [] if experiment.sweep.search == "optuna" else planned_values(experiment, stage)


def _open_run(experiment: Experiment, name: str, folder: str) -> Run:
    """The MLflow run of the sweep, known by its record."""
    url = files.join(folder, _RECORD)
    before = read_record(url)["run"] if files.exists(url) else None
    run = start_run(experiment, name, before)
    if run.run_id != before:
        write_record(url, {"run": run.run_id})
    return run


def _run(
    experiment: Experiment, stage: StageName, space: Mapping[str, Any], known: Sequence[Trial], run: Run
) -> list[Row]:
    folder = files.join(experiment.folder, GOALS[stage].folder)
    population = experiment.sweep.search == "population"
    board = Board(experiment, stage, folder, run.run_id, known)
    try:
        train = partial(_train, experiment, stage, space, board)
        failures = _generations(experiment, stage, board, train) if population else train(known)
    finally:
        try:
            board.close()
        finally:
            for trial in board.trials:  # a stopped sweep ends the processes of its trials at once
                if trial.experiment is not None:
                    end_killed(trial.experiment, stage)
    rows = ranked([read_row(trial, stage, failures) for trial in board.trials], stage)
    best = rows[0]
    files.write_json(files.join(folder, "table.json"), table_json(rows, stage))
    files.write_bytes(files.join(folder, "table.txt"), f"{sweep_table(rows, stage)}\n".encode())
    files.write_bytes(files.join(folder, "best.yaml"), yaml.safe_dump(nested(best.values)).encode())
    run.tags({"bld.best": best.trial})
    board.run_of(best.trial).tags({"bld.best": "this"})
    run.text(sweep_table(rows, stage), "table.txt")
    return rows


def _generations(
    experiment: Experiment, stage: StageName, board: Board, train: Callable[[Sequence[Trial]], dict[str, str]]
) -> dict[str, str]:
    """Train a population; why members have failed, by name. A generation that has a successor is as it is."""
    failures: dict[str, str] = {}
    trials: list[Trial] = []
    known = decided(experiment, stage)
    for number in range(experiment.sweep.generations):
        if number == len(known):
            before = [read_row(trial, stage, failures) for trial in trials]
            known.append(generation(experiment, stage, number, before))
            decide(experiment, stage, known)
        trials = [make_trial(experiment, stage, values) for values in known[number]]
        board.add(trials)
        if number == len(known) - 1:
            failures |= train(trials)
    return failures


def _train(
    experiment: Experiment, stage: StageName, space: Mapping[str, Any], board: Board, trials: Sequence[Trial]
) -> dict[str, str]:
    """Train trials, those that are not there yet, or that the search learns of; why some have failed, by name."""
    optuna = experiment.sweep.search == "optuna"
    replayed = optuna or experiment.sweep.early_stopping == "asha"
    waiting = [trial for trial in trials if trial.experiment and (replayed or not finished(trial, stage))]
    if not (waiting or optuna):
        return {}
    with nodes_watched(experiment.cluster.of_work(decodes=stage == "autoencoder").need, experiment.cluster.patience):
        results = _tuner(experiment, stage, space, waiting, board).fit()
    good = any(finished(trial, stage) for trial in trials)
    return _failures(results, experiment, stage, good=good)


def _tuner(
    experiment: Experiment, stage: StageName, space: Mapping[str, Any], waiting: Sequence[Trial], board: Board
) -> Tuner:
    keep_keys_from_tune()
    config, cluster, goal = experiment.sweep, experiment.cluster, GOALS[stage]
    uri, parent = experiment.tracking.resolve(experiment.root), board.parent

    def run_trial(settings: dict[str, Any]) -> None:
        os.environ |= _PATIENCE
        known_to_be_there(uri)
        trial = make_trial(experiment, stage, values_of(settings))
        told, steps = trial.allowed, getattr(trial.allowed, goal.training).steps
        trial_run(told, parent, trial.values)
        for evaluated in read_history(files.join(told.folder, stage)):  # of an earlier start
            if evaluated.step < steps:
                ray.tune.report({STEP: evaluated.step, goal.metric: evaluated.metrics[goal.metric]})
        if not was_stopped(told):
            report = reporter_for_others() if told.cluster.workers else ray.tune.report
            teller, exploited = Teller(report, goal.metric, steps), _weights_of_parent(experiment, stage, trial)
            if stage == "prior":
                train_prior(told, source=experiment.folder, told=teller, exploited=exploited)
            else:
                train_autoencoder(told, told=teller, exploited=exploited)
            last = read_row(trial, stage, {})
            ray.tune.report({STEP: steps, goal.metric: last.metrics[goal.metric]})

    optuna = config.search == "optuna"
    search = optuna_search(experiment, space, board.asked) if optuna else None
    return Tuner(
        ray.tune.with_resources(run_trial, _reserved(cluster)),
        param_space=domains(space) if optuna else planned([trial.values for trial in waiting]),
        tune_config=TuneConfig(
            metric=goal.metric,
            mode=goal.mode,
            search_alg=search,
            scheduler=scheduler(config),
            num_samples=config.trials if optuna else 1,
            max_concurrent_trials=min(config.concurrent, room(experiment, stage)),
            reuse_actors=True,  # a process takes seconds to start
        ),
        run_config=RunConfig(
            name="tune",
            **run_storage(board.folder),
            verbose=0,
            callbacks=[board],
            failure_config=FailureConfig(max_failures=_tries(cluster)),
        ),
    )


def _reserved(cluster: ClusterConfig) -> PlacementGroupFactory:
    """What the process of a trial reserves: nothing, where it waits for workers, which reserve their own.

    A hundredth of a core for it would leave nodes that the workers would fill too small for these, and trials would
    wait for one another without end. Ray wants something: this is a byte.
    """
    if cluster.workers:
        return PlacementGroupFactory([{"CPU": 0.0, "memory": 1.0}])
    own = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpu_share} if cluster.gpu else {})
    return PlacementGroupFactory([own], bundle_label_selector=[cluster.worker_nodes])


def _weights_of_parent(experiment: Experiment, stage: StageName, trial: Trial) -> str:
    """The checkpoint from which a trial of a population goes on; "" where it begins with none."""
    if not (parent := parent_of(trial.values)):
        return ""
    return checkpoints(files.join(experiment.folder, GOALS[stage].folder, parent, stage))[-1]


def start_of_full_length(experiment: Experiment, stage: StageName, values: Values) -> str:
    """Folder of a trial from whose checkpoint a training of full length goes on; "" where it would have come by none.

    Args:
        experiment: of the sweep.
        stage: of the sweep.
        values: of the trial.
    """
    if experiment.sweep.search == "population":  # whose weights come from other settings, too
        return ""
    trial, training = make_trial(experiment, stage, values).allowed, GOALS[stage].training
    steps = getattr(experiment, training).steps
    longer = replace(trial, **{training: replace(getattr(trial, training), steps=steps)})
    return trial.folder if shared_checkpoint(longer, stage, trial.folder, experiment.sweep.steps) else ""


def room(experiment: Experiment, stage: StageName) -> int:
    """How many trials the cluster holds at the same time, each with all of its workers: no two wait for each other."""
    cluster = experiment.cluster
    nodes = nodes_there(cluster.worker_nodes)
    fits = sum(rooms(cluster.cpus_per_worker, cluster.gpus_per_worker, nodes)) // cluster.replicas
    if stage == "autoencoder":  # whose images are decoded beside its workers
        for need in (cluster.need, *cluster.need.parts):
            fits = min(fits, int(cluster_has(*need.on)["CPU"] / need.cpus + 1e-6))
    return max(1, fits)


def _tries(cluster: ClusterConfig) -> int:
    """How often a trial that has failed begins again, from its checkpoint; Ray Train counts deaths of its workers."""
    return _TRIES if cluster.workers else cluster.max_failures


def _why(failure: Exception, cluster: ClusterConfig) -> Exception:
    """Why a trial has failed, in words, where its process has died."""
    if isinstance(failure, RayActorError) and not cluster.workers:
        return died("its process", _tries(cluster) + 1, failure, "failed")
    return failure


def _failures(results: ResultGrid, experiment: Experiment, stage: StageName, *, good: bool) -> dict[str, str]:
    """Why trials have failed, by name.

    Raises:
        UserError: none has succeeded; as the first has failed.
    """
    failed = {
        make_trial(experiment, stage, values_of(result.config)).name: _why(unwrap(result.error), experiment.cluster)
        for result in results
        if result.error is not None and result.config is not None
    }
    if len(failed) == len(results) and not good:  # nor has any at an earlier start
        for failure in failed.values():
            if isinstance(failure, UserError):
                raise failure
        raise RuntimeError(f"all {len(failed)} trials failed; the first: {results.errors[0]}")
    return {name: str(error).splitlines()[0].replace("`", "") for name, error in failed.items()}
