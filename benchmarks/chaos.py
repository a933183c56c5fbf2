"""Seeded disasters: commands that lose workers, nodes, themselves and their servers, and what they make all the same.

    python -m benchmarks.chaos autoencoder|encoding|training|evaluation [--rounds 10] [--seed 0]
                               [--events 2] [--kinds worker node command S3 MLflow]

A Ray cluster of a head and two nodes of one core, an S3 server and an MLflow server run on this machine. A command with
two workers first goes undisturbed: stage 1, the encode job, stage 2, or the evaluation. Each round then runs it in a
folder of its own, and twice, after a random time, something happens: a worker or a node is killed, and the node
replaced after some seconds; the command is killed, and run again; the S3 or the MLflow server is away for some seconds.
Prints one JSON line a round: its seconds, what happened when, and whether what was made is the undisturbed one's, bit
by bit, and when after the last event it went on; at last how many rounds were, and the seconds that an event has cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from s3fs import S3FileSystem

from bld_core.autoencoder.network import AutoencoderConfig
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents
from cluster.data.shards import ShardConfig, make_shards
from cluster.evaluation.config import EvaluationConfig
from cluster.runtime import ClusterConfig
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import small_experiment, small_training
from tests.servers import MlflowServer, Nodes, S3Server

REPOSITORY = Path(__file__).parents[1]
KINDS = ("worker", "node", "command", "S3", "MLflow")
AWAY_S = 8.0  # of a server; and until a node is replaced
LIMIT_S = 600.0  # from one event to the next, and from the last to the end
_TRIES = 5
_MIDDLE = (0.1, 0.8)  # of its share of the undisturbed work, within which an event comes
STAGES = (("autoencoder", train_autoencoder), ("latents", encode_latents), ("prior", train_prior))


class Work(NamedTuple):
    """A command that is disturbed.

    Attributes:
        script: of the command.
        before: how many of the stages it needs.
        worker: what Ray calls its workers' processes.
        made: the files that count.
        settings: of the experiment, by which it takes long enough to be disturbed.
    """

    script: str
    before: int
    worker: str
    made: str
    settings: dict[str, Any]


_STEPS = {"log_every": 20, "checkpoint_every": 50}
_LARGE = {"autoencoder": AutoencoderConfig(bits=8, channels=32, multipliers=[1, 2, 2, 2], blocks=2, attention=[])}
_STAGE1 = {"autoencoder_training": small_training(200, **_STEPS)}
_STAGE2 = {"prior_training": small_training(600, **_STEPS)}
_MEASURED = {"evaluation": EvaluationConfig(samples=8000, batch_size=100, class_accuracy=True)}
_FINAL = "final/*.safetensors"
WORKS = {
    "autoencoder": Work("stage1_ae.py", 0, "RayTrainWorker", f"autoencoder/{_FINAL}", _STAGE1),
    "encoding": Work("encode_latents.py", 1, "Encoder", "latents/*/*.parquet", _LARGE),
    "training": Work("stage2_prior.py", 2, "RayTrainWorker", f"prior/{_FINAL}", _STAGE2),
    "evaluation": Work("evaluate.py", 3, "Evaluator", "evaluation/report.json", _MEASURED),
}


@dataclass
class Machines:
    """Nodes and servers, and the small experiment whose stages all rounds begin with.

    Attributes:
        folder: of everything.
        work: that is disturbed.
        base: the experiment, with what the work needs.
        s3: whose bucket holds the experiments.
        mlflow: that they report to.
        nodes: a head without cores, and two of one.
    """

    folder: Path
    work: Work
    base: Experiment
    s3: S3Server
    mlflow: MlflowServer
    nodes: Nodes

    def add_node(self) -> None:
        """A node more, one that stays: under load Ray's raylet may give up the wait for its own agents."""
        log = self.folder / f"node-{len(self.nodes.processes)}.log"
        for _ in range(_TRIES):
            self.nodes.start()
            while self.nodes.processes[-1].poll() is None:
                if "Ray runtime started" in log.read_text():
                    return
                time.sleep(0.2)
            self.nodes.processes.pop()
        raise RuntimeError(f"no node has stayed, of {_TRIES}:\n{log.read_text()}")

    def experiment(self, name: str) -> tuple[list[str], Path]:
        """The command in a folder of its own, and where that lies."""
        cluster = ClusterConfig(address=f"127.0.0.1:{self.nodes.port}", workers=2, decode_tasks=0, wait_for_nodes=60)
        made: Experiment = replace(
            self.base, root=f"s3://bucket/{name}", cluster=cluster, tracking=TrackingConfig(uri=self.mlflow.uri)
        )
        settings, place = self.folder / f"{name}.yaml", self.s3.folder / "bucket" / name / self.base.name
        settings.write_text(yaml.safe_dump(asdict(made)))
        storage = S3FileSystem()  # rclone does not see what is put into its folder otherwise
        for stage, _ in STAGES[: self.work.before]:
            storage.put(f"{self.base.folder}/{stage}", f"{made.folder}/{stage}", recursive=True)
        return [sys.executable, f"pipelines/{self.work.script}", "--config", str(settings)], place

    def happens(self, kind: str, command: Command, dice: random.Random) -> bool:
        """One event; whether there was something that it could happen to."""
        if kind == "worker":
            there = self._workers()
            if not there:  # they are being started again
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(there).kill()
            time.sleep(1)  # what they have said until now is passed on
        elif kind == "command":
            command.end()
            command.start()
        else:
            goes, comes = {
                "node": (self.nodes.kill, self.add_node),
                "S3": (self.s3.stop, self.s3.start),
                "MLflow": (self.mlflow.kill, self.mlflow.start),
            }[kind]
            goes()
            time.sleep(AWAY_S)
            comes()
        return True

    def _workers(self) -> list[psutil.Process]:
        """The processes of the command's workers, on these nodes alone."""
        found = list[psutil.Process]()
        for node in self.nodes.processes:
            for each in psutil.Process(node.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    if each.cmdline()[:1] and each.cmdline()[0].startswith(f"ray::{self.work.worker}"):
                        found.append(each)
        return found


@contextlib.contextmanager
def machines_of(work: Work) -> Generator[Machines]:
    """The machines, for as long as they are needed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        s3, tracking = S3Server(folder / "s3"), folder / "mlflow"
        for path in (s3.folder / "bucket", tracking):
            path.mkdir(parents=True)
        os.environ |= s3.settings | {"BLD_CACHE": f"{folder}/cache"}
        stack.callback(s3.stop)
        s3.start()
        mlflow = MlflowServer(tracking)
        stack.callback(mlflow.kill)
        shards = make_shards(ShardConfig(output=str(folder / "digits"), images_per_shard=60)).patterns
        base = replace(small_experiment(folder / "base", shards), **work.settings)
        for _, make in STAGES[: work.before]:
            make(base)
        nodes = Nodes(folder, head_cpus=0)
        stack.callback(nodes.end)
        machines = Machines(folder, work, base, s3, mlflow, nodes)
        machines.add_node()
        machines.add_node()
        yield machines


class Command:
    """A command that can be killed and started again; all of them say what they say in one file."""

    def __init__(self, words: list[str], log: Path, nodes: Nodes) -> None:
        self._words, self._log = words, log
        keys = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self._environment = os.environ | keys | {"PYTHONPATH": str(REPOSITORY)}
        self.start()

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._words, cwd=REPOSITORY, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def works(self, since: int = 0) -> bool:
        """Whether it has said that it goes on, after so many characters."""
        return re.search(r"(autoencoder|encode|prior|evaluate)  \d", self.said()[since:]) is not None

    def said(self) -> str:
        return self._log.read_text()

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether it became true before the command has ended."""
        ends = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            if until():
                return True
            if time.monotonic() > ends:
                self.end()
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """Kill it, where it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Round(NamedTuple):
    """How a round went: its seconds, of its work alone, and until it went on; its events, and what was made."""

    took: float
    worked: float
    paused: float
    events: list[tuple[str, float]]
    made: dict[Path, bytes]


def play(machines: Machines, name: str, dice: random.Random, plan: Sequence[tuple[float, str]] = ()) -> Round:
    """Run the command; each event of the plan comes so many seconds after the one before, the first as work begins."""
    words, where = machines.experiment(name)
    began, log, events = time.monotonic(), machines.folder / f"{name}.log", list[tuple[str, float]]()
    command = Command(words, log, machines.nodes)
    try:
        command.wait(command.works)
        working = hit = time.monotonic()
        for gap, kind in plan:
            due = time.monotonic() + gap
            if not command.wait(lambda due=due: time.monotonic() >= due):
                break
            hit = time.monotonic()
            if machines.happens(kind, command, dice):
                events.append((kind, round(hit - working, 1)))
        command.wait(partial(command.works, len(command.said())))
        paused = time.monotonic() - hit
        command.wait(lambda: False)
    finally:
        command.end()
    over = time.monotonic()
    if command.process.returncode:
        print(f"{name} ended with {command.process.returncode}, after {events}:\n{command.said()}", file=sys.stderr)
    made = {path.relative_to(where): path.read_bytes() for path in where.glob(machines.work.made)}
    return Round(over - began, over - working, paused, events, made)


def main(name: str, rounds: int, seed: int, events: int, kinds: Sequence[str]) -> None:
    with machines_of(WORKS[name]) as machines:
        calm = play(machines, "undisturbed", random.Random())
        equal, lost, counts = 0, list[float](), Counter[str]()
        for number in range(rounds):
            dice = random.Random(f"{seed} {name} {number}")
            plan = [(dice.uniform(*_MIDDLE) * calm.worked / events, dice.choice(kinds)) for _ in range(events)]
            one = play(machines, f"round-{number}", dice, plan)
            same = one.made == calm.made and len(calm.made) > 0
            equal += same
            counts.update(kind for kind, _ in one.events)
            if one.events:
                lost.append((one.took - calm.took) / len(one.events))
            line = {
                "name": f"chaos, {name}, round {number}",
                "value": round(one.took, 1),
                "unit": "s",
                "peer": "undisturbed",
                "ratio": round(one.took / calm.took, 2),
                "events": one.events,
                "went_on_after_s": round(one.paused, 1) if one.events else None,
                "equal": same,
            }
            print(json.dumps(line), flush=True)
    line = {
        "name": f"chaos, {name}",
        "value": equal,
        "unit": "rounds equal",
        "peer": "rounds",
        "ratio": equal / rounds,
        "events": counts,
        "undisturbed_s": round(calm.took, 1),
        "median_s_lost_an_event": round(statistics.median(lost), 1) if lost else None,
        "worst_s_lost_an_event": round(max(lost), 1) if lost else None,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("work", choices=WORKS)
    words.add_argument("--rounds", type=int, default=10)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--events", type=int, default=2, help="of a round")
    words.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of events")
    given = words.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nodes and servers end with it, too
    main(given.work, given.rounds, given.seed, given.events, given.kinds)
