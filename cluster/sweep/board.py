"""What a sweep's command knows of its trials while they run: shown on the terminal, logged, and written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from bld_core.storage import files
from bld_core.storage.records import read_record, write_record
from cluster.config.experiment import Experiment
from cluster.console import Progress
from cluster.stages import end_killed
from cluster.sweep.search import STEP, values_of
from cluster.sweep.space import GOALS, StageName, Trial, Values, make_trial, span_of, trial_name
from cluster.sweep.table import finished
from cluster.tracking.runs import Run, trial_run
from cluster.training.history import read_history

_ASKED = "asked.json"
_STOPPED = "stopped.json"


class Board(Callback):
    """Listens to Tune in the command's process.

    Args:
        experiment: of the sweep.
        stage: of the sweep.
        folder: of the sweep.
        parent: id of the sweep's MLflow run.
        known: the trials, as far as they are known before they begin.
    """

    def __init__(
        self, experiment: Experiment, stage: StageName, folder: str, parent: str, known: Sequence[Trial]
    ) -> None:
        self.folder, self.parent = folder, parent
        self._experiment, self._goal = experiment, GOALS[stage]
        self._stage: StageName = stage
        url = files.join(folder, _ASKED)
        self.asked: list[Values] = read_record(url)["values"] if files.exists(url) else []
        self._trials = {trial.name: trial for trial in known}
        self._steps: dict[str, int] = {}
        self._best: float | None = None
        self._running, self._ended = set[str](), set[str]()
        self._runs: dict[str, Run] = {}
        self._several = sum(node["Alive"] for node in ray.nodes()) > 1
        self._telling = ThreadPoolExecutor(1)  # Tune's loop does not wait for MLflow
        self._told: list[Future[None]] = []
        count = len(known) or experiment.sweep.trials
        self._progress = Progress("sweep", count * experiment.sweep.steps)

    @property
    def trials(self) -> list[Trial]:
        """All that have begun, and those that are known before."""
        return list(self._trials.values())

    def add(self, trials: Sequence[Trial]) -> None:
        """Take up the next generation of a population."""
        self._trials |= {trial.name: trial for trial in trials}

    def run_of(self, name: str) -> Run:
        """The MLflow run of a trial that is not refused."""
        if name not in self._runs:
            trial = self._trials[name]
            self._runs[name] = trial_run(trial.allowed, self.parent, trial.values)
        return self._runs[name]

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        return Callback, ()  # Tune keeps a copy for a way of resuming that is not ours

    def _tell(self, work: Callable[[], None]) -> None:
        self._told.append(self._telling.submit(work))

    def close(self) -> None:
        """End the progress, and wait until MLflow knows all.

        Raises:
            UserError: it does not take it.
        """
        self._progress.close()
        self._telling.shutdown()
        for told in self._told:
            told.result()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Write down what Optuna has drawn, so that another start draws it again."""
        values = values_of(trial.config)
        name = trial_name(values)
        if name not in self._trials:
            self._trials[name] = make_trial(self._experiment, self._stage, values)
        if self._experiment.sweep.search == "optuna" and values not in self.asked:
            self.asked.append(values)
            write_record(files.join(self.folder, _ASKED), {"values": self.asked})
        self._running.add(name)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log an evaluation, and say how the sweep goes."""
        name, metric = trial_name(values_of(trial.config)), self._goal.metric
        if metric not in result:
            return
        self._tell(partial(self._log, name, {metric: float(result[metric])}, int(result[STEP])))
        self._steps[name] = max(result[STEP] - self._span(name)[0], self._steps.get(name, 0))
        better = min if self._goal.mode == "min" else max
        self._best = result[metric] if self._best is None else better(self._best, result[metric])
        self._say()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial that has come to no end was stopped, as others are better: its processes are ended, its run, too."""
        name = trial_name(values_of(trial.config))
        ended = self._trials[name]
        self._say_where(ended)
        if ended.experiment is not None and not finished(ended, self._stage):
            step = self._steps.get(name, 0)
            write_record(files.join(ended.experiment.folder, _STOPPED), {"step": step})
            self._tell(partial(self._end_stopped, ended, step))
        self._end(name)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has failed, also when it was tried again."""
        self._end(trial_name(values_of(trial.config)))

    def _log(self, name: str, metrics: dict[str, float], step: int) -> None:
        self.run_of(name).metrics(metrics, step)

    def _end_stopped(self, trial: Trial, step: int) -> None:
        end_killed(trial.allowed, self._stage)
        self.run_of(trial.name).tags({"bld.stopped_at": str(step)})

    def _say_where(self, ended: Trial) -> None:
        """Which nodes a trial ran on, where there are several."""
        if ended.experiment is None or not self._several:
            return
        history = read_history(files.join(ended.experiment.folder, self._stage))
        if history and history[-1].nodes:
            print(f"{ended.name}: on {', '.join(history[-1].nodes)}", flush=True)

    def _end(self, name: str) -> None:
        self._running.discard(name)
        self._ended.add(name)
        first, last = self._span(name)
        self._steps[name] = last - first  # none of them is left
        self._say()

    def _span(self, name: str) -> tuple[int, int]:
        return span_of(self._experiment, self._trials[name].values)

    def _say(self) -> None:
        shown = {"ended": len(self._ended), "running": len(self._running)}
        best = {} if self._best is None else {f"best_{self._goal.metric}": self._best}
        self._progress.update(sum(self._steps.values()), shown | best)


def was_stopped(trial: Experiment) -> bool:
    """Whether a trial was ended early by an earlier start of its sweep."""
    return trial.sweep.early_stopping == "asha" and files.exists(files.join(trial.folder, _STOPPED))
