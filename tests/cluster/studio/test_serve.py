"""The studio on Ray Serve, with a real registry: users share passes, replicas die, champions change, queues fill up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import serve
from ray._private import worker
from ray.serve.config import AutoscalingConfig

from bld_core.errors import UserError
from cluster.config.experiment import Experiment
from cluster.registry.registry import register
from cluster.runtime import ClusterConfig
from cluster.studio.config import ServeConfig
from cluster.studio.pair import Pair, RegisteredSource, open_folder
from cluster.studio.serve import studio
from tests.cluster.studio.client import Answer, ask, begin, pixels
from tests.cluster.studio.conftest import TOKEN
from tests.conftest import random_pair, report_of
from tests.servers import free_port

BATCH, QUEUE = 4, 64
CLUSTER = ClusterConfig(workers=1, cpus_per_worker=0.25)


class Serving:
    """A studio of at most two replicas that serves the champion of a registry."""

    def __init__(self, root: Path, digits: dict[str, str], fewest: int = 2) -> None:
        self.root, self.digits, self.pairs = root, digits, dict[str, Pair]()
        self.uri = f"sqlite:///{root}/mlflow.db"
        self.crown(0)
        config = ServeConfig(
            port=free_port(), min_replicas=fewest, max_replicas=2, batch=BATCH, queue=QUEUE, watch=0.5, wait=0.5
        )
        self._open = ExitStack()
        self.url = self._open.enter_context(
            studio(RegisteredSource("models:/pair@champion", self.uri, "cpu"), config, CLUSTER)
        )

    def crown(self, prior: int) -> str:
        """Register a pair, better than those before; its version."""
        pair = random_pair(self.root / str(prior), self.digits, self.uri, prior=prior)
        made = register(report_of(pair, {"figures": {"bound": 0.5 - 0.1 * prior}, "protocol": "p"}))
        self.pairs[made.version] = open_folder(pair.folder, "pair", made.version, "cpu")
        return made.version

    def ask(self, path: str, body: object = None, **headers: str) -> Answer:
        """With the token."""
        return ask(f"{self.url}{path}", body, Authorization=f"Bearer {TOKEN}", **headers)

    def begin(self, path: str, body: object) -> Any:
        """The same, its answer yet to be read."""
        return begin(f"{self.url}{path}", body, Authorization=f"Bearer {TOKEN}")

    def check(self, wanted: dict[str, Any], answer: Answer) -> str:
        """See that an answer is what the pair of its version draws; the version."""
        assert answer.status == 200, answer.body
        said = answer.json
        settings = {name: wanted[name] for name in ("guidance", "steps") if name in wanted}
        drawn = self.pairs[said["version"]].generator.sample(
            labels=[wanted["label"]] * wanted["count"], seed=wanted["seed"], batch_size=BATCH, **settings
        )
        assert torch.equal(torch.stack([pixels(each["png"]) for each in said["images"]]), drawn), wanted
        assert answer.headers["X-Model-Version"] == said["version"]
        return said["version"]

    def close(self) -> None:
        """End it, once what is under way is answered."""
        self._open.close()


@pytest.fixture(scope="module")
def serving(ray_session: None, tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str]) -> Iterator[Serving]:
    os.environ["BLD_TOKEN"] = TOKEN
    try:
        made = Serving(tmp_path_factory.mktemp("serving"), digits)
    finally:
        del os.environ["BLD_TOKEN"]
    yield made
    made.close()
    serve.shutdown()


def under_load(
    serving: Serving, happens: Callable[[], object], until: Callable[[set[str]], bool], many: int = 4
) -> set[str]:
    """Users ask one thing after the other, and something happens; every answer is right. The versions seen."""
    over, versions, answered = threading.Event(), set[str](), [0] * many

    def user(number: int) -> None:
        while not over.is_set():
            wanted = {"label": number % 10, "seed": 100 * number + answered[number], "count": BATCH}
            versions.add(serving.check(wanted, serving.ask("v1/samples", wanted)))
            answered[number] += 1

    with ThreadPoolExecutor(many) as pool:
        users = [pool.submit(user, number) for number in range(many)]
        try:
            ends = time.monotonic() + 90

            def wait(ready: Callable[[], bool]) -> None:
                while not (ready() or any(user.done() for user in users)) and time.monotonic() < ends:
                    time.sleep(0.1)

            wait(lambda: min(answered) > 0)
            happens()
            wait(lambda: until(versions))
            before = list(answered)
            wait(lambda: all(now > then + 1 for now, then in zip(answered, before, strict=True)))
        finally:
            over.set()
        for each in users:
            each.result()
    assert until(versions)
    assert all(now > then + 1 for now, then in zip(answered, before, strict=True)), "answered after it happened, too"
    return versions


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    source, cluster = RegisteredSource("models:/pair@champion", "", "cpu"), ClusterConfig()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = pytest.raises(UserError, match=f"`port` {port}, where the studio cannot listen .*: choose others")
        with told, studio(source, ServeConfig(port=port), cluster):
            pass


@pytest.mark.long
def test_users_share_passes_and_each_has_the_images_of_his_own_seed(serving: Serving) -> None:
    wanted = [
        {"label": n % 10, "seed": n, "count": 1 + n % 3 * 2} | ({"guidance": 3.0, "steps": 6} if n % 4 == 3 else {})
        for n in range(16)
    ]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(serving.ask, ["v1/samples"] * 16, wanted))
    for body, answer in zip(wanted, together, strict=True):
        serving.check(body, answer)
    alone = serving.ask("v1/samples", wanted[5])
    assert alone.body == together[5].body, "the same bytes, whoever else asks"
    streamed = serving.ask("v1/samples/stream", wanted[5]).body.decode()
    assert streamed.count("event: step\n") == 2 * 5, "two passes of four steps"
    assert alone.body.decode() in streamed
    refused = serving.ask("v1/samples", {"label": 10})
    assert (refused.status, refused.json["error"]["field"]) == (422, "label")
    assert ask(f"{serving.url}v1/samples", wanted[5]).status == 401


def replicas() -> set[str]:
    named: Any = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in named if "#Replica#" in each["name"]}


@pytest.mark.long
def test_a_replica_that_is_killed_loses_nobodys_request(serving: Serving) -> None:
    before = replicas()
    assert len(before) == 2
    under_load(serving, lambda: ray.kill(ray.get_actor(min(before), "serve")), lambda _: min(before) not in replicas())


@pytest.mark.long
def test_a_stream_whose_replica_is_killed_goes_on_and_repeats_nothing(serving: Serving) -> None:
    wanted = {"label": 3, "seed": 11, "count": 32, "steps": 64}
    with serving.begin("v1/samples/stream", wanted) as begun:
        said = begun.readline()
        for name in replicas():  # one of them has the stream
            ray.kill(ray.get_actor(name, "serve"))
        said += begun.read()
    events = [event.split(b"\ndata: ") for event in said.strip().split(b"\n\n")]
    assert {name for name, _ in events[:-1]} == {b"event: step"}
    steps = [(data["first"], data["step"]) for data in (json.loads(data) for _, data in events[:-1])]
    assert len(steps) == len({*steps})
    assert events[-1][0] == b"event: done"
    serving.check(wanted, Answer(200, begun.headers, events[-1][1]))


@pytest.mark.long
def test_a_new_champion_is_taken_up_under_load(serving: Serving) -> None:
    assert under_load(serving, lambda: serving.crown(1), lambda versions: "2" in versions) == {"1", "2"}


@pytest.mark.long
def test_who_asks_for_more_than_may_wait_is_told_to_come_again(serving: Serving) -> None:
    body = {"label": 1, "seed": 1, "count": QUEUE, "steps": 64}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(serving.ask, ["v1/samples"] * 8, [body] * 8))
    assert {answer.status for answer in answers} == {200, 503}
    busy = next(answer for answer in answers if answer.status == 503)
    assert int(busy.headers["Retry-After"]) >= 1
    assert "ask again in" in busy.json["error"]["message"]


@pytest.mark.long
def test_what_is_under_way_is_answered_when_the_studio_closes_and_no_log_has_the_token(serving: Serving) -> None:
    wanted = {"label": 2, "seed": 3, "count": 32, "steps": 64}
    with serving.begin("v1/samples/stream", wanted) as begun:
        said = begun.readline() + begun.readline()
        assert said.startswith(b"event: step\n"), "it is under way"
        serving.close()
        said += begun.read()
    assert b"event: error" not in said
    done = said.split(b"event: done\ndata: ")[1].strip()
    serving.check(wanted, Answer(200, begun.headers, done))
    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]  # there is no public way
    logs = [path for path in Path(node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert any("serve" in path.parts for path in logs)
    assert [path for path in logs if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.long
def test_a_second_replica_comes_with_many_users_and_goes_with_them(
    ray_session: None, tmp_path: Path, digits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ray.is_initialized():
        serve.shutdown()  # of the studio before, which listens elsewhere
    quick = {"upscale_delay_s": 1, "downscale_delay_s": 1, "metrics_interval_s": 0.5, "look_back_period_s": 2}
    hasty = partial(AutoscalingConfig, **quick)
    monkeypatch.setattr("cluster.studio.serve.AutoscalingConfig", hasty)
    serving = Serving(tmp_path, digits, fewest=1)
    try:
        assert len(replicas()) == 1
        many = 2 * BATCH + 2  # at a time; twice a batch is what one replica takes before a second is asked for
        under_load(serving, lambda: None, lambda _: len(replicas()) == 2, many)
        ends = time.monotonic() + 60
        while len(replicas()) > 1 and time.monotonic() < ends:
            time.sleep(0.2)
        assert len(replicas()) == 1
    finally:
        serving.close()
        serve.shutdown()


@pytest.mark.long
def test_the_command_ends_within_half_a_minute_of_sigterm_and_leaves_nothing(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    pair: Experiment = random_pair(tmp_path, digits, "")
    port = free_port()
    flags = [f"--name={pair.name}", f"--root={pair.root}", f"--serve.port={port}", "--cluster.cpus_per_worker=0.25"]
    flags += [f"--data.train={digits['train']}", f"--data.validation={digits['validation']}", "--data.image_size=32"]
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"BLD_TOKEN": TOKEN}
    with open(log, "wb") as said:
        command = subprocess.Popen(
            [sys.executable, "pipelines/serve.py", *flags], stdout=said, stderr=said, env=environment
        )
    try:
        ends = time.monotonic() + 180
        while f"http://127.0.0.1:{port}/" not in log.read_text():
            assert command.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.2)
        assert ask(f"http://127.0.0.1:{port}/v1/samples", {"label": 1}, Authorization=f"Bearer {TOKEN}").status == 200
        family = psutil.Process(command.pid).children(recursive=True)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(family, 10)
        assert alive == []
        assert "Traceback" not in log.read_text()
        assert TOKEN not in log.read_text()
    finally:
        command.kill()
