"""Seeded disasters: commands that lose workers, nodes, themselves and their servers, and what they make all the same.

    python -m benchmarks.chaos training|encoding [--rounds 10] [--seed 0]

A Ray cluster of a head and two nodes of one core, an S3 server and an MLflow server run on this machine. A command of
stage 2, or of the encode job, with two workers first goes undisturbed. Each round then runs it in a folder of its own,
and twice, after a random time, something happens: a worker or a node is killed, and the node replaced after some
seconds; the command is killed, and run again; the S3 or the MLflow server is away for some seconds. Prints one JSON
line a round: its seconds, what happened when, and whether what was made is the undisturbed one's, bit by bit; at last
how many rounds were, and the seconds that an event has cost.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from s3fs import S3FileSystem

from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents
from cluster.data.shards import ShardConfig, make_shards
from cluster.runtime import ClusterConfig
from cluster.training.train import train_autoencoder
from tests.conftest import small_experiment, small_training
from tests.servers import MlflowServer, Nodes, S3Server

REPOSITORY = Path(__file__).parents[1]
EVENTS = 2
AWAY_S = 8.0  # of a server; and until a node is replaced
LIMIT_S = 600.0  # from one event to the next, and from the last to the end
_TRIES = 5


class Work(NamedTuple):
    """A command that is disturbed.

    Attributes:
        script: of the command.
        needs: the stages before it.
        worker: the beginning of the names of its workers' processes.
        made: the files that count.
    """

    script: str
    needs: list[str]
    worker: str
    made: str


WORKS = {
    "training": Work("stage2_prior.py", ["autoencoder", "latents"], "ray::RayTrainWorker", "prior/final/*.safetensors"),
    "encoding": Work("encode_latents.py", ["autoencoder"], "ray::Encoder", "latents/*/*.parquet"),
}


class Machines:
    """Nodes and servers, and the small experiment whose stages all rounds begin with.

    Args:
        folder: of everything.
        work: that is disturbed.
    """

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work, self._open = folder, work, ExitStack()
        try:
            self._start()
        except BaseException:
            self.end()
            raise

    def _start(self) -> None:
        folder, work = self.folder, self.work
        self.s3, self.tracking = S3Server(folder / "s3"), folder / "mlflow"
        for path in (self.s3.folder / "bucket", self.tracking):
            path.mkdir(parents=True)
        os.environ |= self.s3.settings
        self.s3.start()
        self._open.callback(self.s3.stop)
        self._files = S3FileSystem()  # rclone does not see what is put into its folder otherwise
        self.mlflow = MlflowServer(self.tracking)
        self._open.callback(self.mlflow.kill)
        shards = make_shards(ShardConfig(output=str(folder / "digits"), images_per_shard=60)).patterns
        small = small_experiment(folder / "base", shards)
        small = replace(small, autoencoder=replace(small.autoencoder, channels=32, blocks=2))
        self.base = replace(small, prior_training=small_training(600, log_every=20, checkpoint_every=50))
        train_autoencoder(self.base)
        if "latents" in work.needs:
            encode_latents(self.base)
        self.nodes = Nodes(folder, head_cpus=0)
        self._open.callback(self.nodes.end)
        self._add_node()
        self._add_node()

    def _add_node(self) -> None:
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

    def end(self) -> None:
        """End all of them."""
        self._open.close()

    def experiment(self, name: str) -> tuple[list[str], Path]:
        """The command in a folder of its own, and where that lies."""
        cluster = ClusterConfig(address=f"127.0.0.1:{self.nodes.port}", workers=2, decode_tasks=0, wait_for_nodes=60)
        made: Experiment = replace(
            self.base, root=f"s3://bucket/{name}", cluster=cluster, tracking=TrackingConfig(uri=self.mlflow.uri)
        )
        settings, place = self.folder / f"{name}.yaml", self.s3.folder / "bucket" / name / self.base.name
        settings.write_text(yaml.safe_dump(asdict(made)))
        for stage in self.work.needs:
            self._files.put(f"{self.base.folder}/{stage}", f"{made.folder}/{stage}", recursive=True)
        return [sys.executable, f"pipelines/{self.work.script}", "--config", str(settings)], place

    def happens(self, kind: str, command: Command, dice: random.Random) -> bool:
        """One event; whether there was something that it could happen to."""
        if kind == "worker":
            there = self._workers()
            if not there:  # they are being started again
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(there).kill()
        elif kind == "node":
            self.nodes.kill()
            time.sleep(AWAY_S)
            self._add_node()
        elif kind == "command":
            command.end()
            command.start()
        elif kind == "S3":
            self.s3.stop()
            time.sleep(AWAY_S)
            self.s3.start()
        else:
            self.mlflow.kill()
            time.sleep(AWAY_S)
            self.mlflow.start()
        return True

    def _workers(self) -> list[psutil.Process]:
        """The processes of the command's workers, on these nodes alone."""
        found = list[psutil.Process]()
        for node in self.nodes.processes:
            for each in psutil.Process(node.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    if each.cmdline()[:1] and each.cmdline()[0].startswith(self.work.worker):
                        found.append(each)
        return found


KINDS = ("worker", "node", "command", "S3", "MLflow")


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


def digest(place: Path, made: str) -> dict[str, str]:
    """The files that count, and their sha256."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.glob(made))
    }


class Round(NamedTuple):
    """How a round went: its seconds, those of its work alone, its events, and what was made."""

    took: float
    worked: float
    events: list[tuple[str, float]]
    made: dict[str, str]


def play(machines: Machines, name: str, dice: random.Random, span: float) -> Round:
    """Run the command; events come at random times after one another, within half of `span` seconds each."""
    words, where = machines.experiment(name)
    planned = [(dice.uniform(0, span / EVENTS), dice.choice(KINDS)) for _ in range(EVENTS if span else 0)]
    began, log, events = time.monotonic(), machines.folder / f"{name}.log", list[tuple[str, float]]()
    command = Command(words, log, machines.nodes)
    try:
        command.wait(lambda: re.search(r"(prior|encode)  \d", command.said()) is not None)
        working = time.monotonic()
        for gap, kind in planned:
            due = time.monotonic() + gap
            if not command.wait(lambda due=due: time.monotonic() >= due):
                break
            now = round(time.monotonic() - working, 1)
            if machines.happens(kind, command, dice):
                events.append((kind, now))
        command.wait(lambda: False)
    finally:
        command.end()
    over = time.monotonic()
    if command.process.returncode:
        print(f"{name} ended with {command.process.returncode}, after {events}:\n{command.said()}", file=sys.stderr)
    return Round(over - began, over - working, events, digest(where, machines.work.made))


@contextlib.contextmanager
def machines_of(work: Work) -> Generator[Machines]:
    """The machines, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        os.environ["BLD_CACHE"] = f"{folder}/cache"
        machines = Machines(Path(folder), work)
        try:
            yield machines
        finally:
            machines.end()


def main(kind: str, rounds: int, seed: int) -> None:
    with machines_of(WORKS[kind]) as machines:
        calm = play(machines, "undisturbed", random.Random(), 0)
        equal, lost, kinds = 0, list[float](), Counter[str]()
        for number in range(rounds):
            one = play(machines, f"round-{number}", random.Random(f"{seed} {kind} {number}"), calm.worked)
            same = one.made == calm.made and len(calm.made) > 0
            equal += same
            kinds.update(kind for kind, _ in one.events)
            if one.events:
                lost.append((one.took - calm.took) / len(one.events))
            print(
                json.dumps(
                    {
                        "name": f"chaos, {kind}, round {number}",
                        "value": round(one.took, 1),
                        "unit": "s",
                        "peer": "undisturbed",
                        "ratio": round(one.took / calm.took, 2),
                        "events": one.events,
                        "equal": same,
                    }
                ),
                flush=True,
            )
        print(
            json.dumps(
                {
                    "name": f"chaos, {kind}",
                    "value": equal,
                    "unit": "rounds equal",
                    "peer": "rounds",
                    "ratio": equal / rounds,
                    "events": kinds,
                    "undisturbed_s": round(calm.took, 1),
                    "median_s_lost_an_event": round(statistics.median(lost), 1) if lost else None,
                    "worst_s_lost_an_event": round(max(lost), 1) if lost else None,
                }
            )
        )


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("work", choices=WORKS)
    words.add_argument("--rounds", type=int, default=10)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    main(given.work, given.rounds, given.seed)
