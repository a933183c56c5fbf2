"""The console of a local run: what Ray and MLflow chat about is gone, what goes wrong is not."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.train import TrainingFailedError

from bld_core.training.loop import Batch
from cluster.config.artifacts import open_codes
from cluster.config.experiment import Experiment
from cluster.console import user_errors_answered
from cluster.runtime import map_on_actors
from cluster.stages import open_stage
from cluster.training.tasks import PriorTask, Worker
from cluster.training.train import fit
from tests.conftest import small_experiment
from tests.console import unknown

REPOSITORY = Path(__file__).parents[2]


def test_no_space_is_one_message_whoever_meets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "gone/away/file")
    with pytest.raises(SystemExit) as ended, user_errors_answered({}, "python a.py"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
    assert ended.value.code == 2
    message = (
        rf"error: no space for '{file}' \(No space left on device; [\d,]+ bytes are free there\): free some, or .*\n"
    )
    assert re.fullmatch(message, capsys.readouterr().err)
    with pytest.raises(OSError, match="Input/output error"), user_errors_answered({}, "python a.py"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_as_its_errors_do(
    number: int, code: int, ctrl_c: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), list[BaseException]()

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException as error:
            seen.append(error)
            os.kill(os.getpid(), signal.SIGTERM) if number == signal.SIGTERM else None  # who is stopped, is stopped
            raise

    try:
        with pytest.raises(SystemExit) as ended, user_errors_answered({}, "python a.py"):
            work()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == code
    assert [type(error) for error in seen] == [KeyboardInterrupt]
    assert capsys.readouterr().err == (
        f"stopped by {signal.Signals(number).name}; this goes on where it was: python a.py\n"
    )


class Failing(PriorTask):
    """Stage 2 that warns and fails on its worker."""

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        warnings.warn("ours, by Python", stacklevel=1)
        logging.getLogger("cluster.ours").warning("ours, by a logger")
        sys.stderr.write("ours, by a library\n")
        raise RuntimeError("no space left on device")


class Killed:
    """An actor that is killed, as one that needs too much memory is."""

    def work(self, item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(root: str, source: str, digits: dict[str, str]) -> None:
    """What the process does whose console is read: a training and a job of actors, which fail on their one worker."""
    small = small_experiment(Path(root), digits)
    experiment = replace(small, cluster=replace(small.cluster, workers=1, max_failures=0))
    with open_stage(experiment, "prior", {}, "never") as stage:
        try:
            fit(stage, Failing(experiment, source, open_codes(source)), {})
        except TrainingFailedError:
            traceback.print_exc()
    print("the training has failed", file=sys.stderr)
    list(map_on_actors(Killed, (), "work", [1], experiment.cluster, "killed"))


@pytest.mark.long
def test_what_goes_wrong_on_a_worker_is_shown(finished: Experiment, digits: dict[str, str], tmp_path: Path) -> None:
    call = "import json, sys; from tests.cluster.test_console import fail; fail(*json.loads(sys.argv[1]))"
    arguments = [sys.executable, "-c", call, json.dumps([str(tmp_path), finished.folder, digits])]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    failing, killed = done.stderr.split("the training has failed\n")
    assert re.search(r"^.*test_console.py:\d+: UserWarning: ours, by Python$", failing, re.M)
    assert re.search(r"^ours, by a logger$", failing, re.M)
    assert re.search(r"^ours, by a library$", failing, re.M)
    assert 'in batches\n    raise RuntimeError("no space left on device")' in failing
    assert failing.index("ours, by") < failing.index("RuntimeError: no space left on device")
    assert done.returncode == 1
    assert "ActorDiedError: The actor died unexpectedly" in killed
    assert all("A worker died or was killed" in line for line in unknown(done.stdout))


@pytest.mark.parametrize("line", ["INFO mlflow: Updating database tables", "(RayTrainWorker pid=1) prior  1/2", "x: y"])
def test_a_line_of_another_form_is_found(line: str) -> None:
    ours = "prior  50/800  6.82/s  1m49s left  loss 0.473  learning_rate 2e-05\nprior: already done in runs/demo/prior"
    assert unknown(f"{ours}\n{line}\n") == [line]
