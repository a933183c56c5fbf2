"""The studio under load on loopback, beside bare batched sampling and `mlflow models serve`.

    python benchmarks/serve.py runs/demo [seconds [images [steps]]]

of an experiment's folder. Closed loop: 1 to 64 clients, each of which asks for the next images, four, when it has them;
of as many steps as the pair has found good, or as said.
Open loop: requests come at random times, at seven tenths of the rate of 16 clients, whoever is answered. Bare sampling
draws batches one after the other in a thread, as the replica does; of several sizes the fastest counts. `mlflow models
serve` has one client, which is what it can do. Everything is measured in turns. At last 5,000 requests of one step, and
the memory of the replica after the first 500 and after all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import mlflow.pyfunc
import psutil
import torch
from mlflow.models import Model

import bld_core
from bld_core.generator import Generator as Pair
from cluster.runtime import ClusterConfig
from cluster.studio.config import ServeConfig
from cluster.studio.pair import FolderSource
from cluster.studio.serve import studio

ROUNDS = 3
CLIENTS = (1, 4, 16, 64)
SIZES = (8, 16, 32, 64)
REQUESTS = 5_000
IMAGES = int(sys.argv[3]) if len(sys.argv) > 3 else 4  # of a request
STEPS = int(sys.argv[4]) if len(sys.argv) > 4 else None  # of a sample


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def ask(session: aiohttp.ClientSession, url: str, body: object) -> float:
    """Seconds until the answer is there."""
    began = time.perf_counter()
    async with session.post(url, json=body) as answer:
        said = await answer.read()
        assert answer.status == 200, said
    return time.perf_counter() - began


async def closed(url: str, bodies: Iterable[object], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Images a second of some clients, and the seconds of each request."""
    took, left, began = list[float](), iter(bodies), time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for body in left:
                took.append(await ask(session, url, body))
                if time.perf_counter() - began > seconds:
                    return

        await asyncio.gather(*(client() for _ in range(clients)))
    return IMAGES * len(took) / (time.perf_counter() - began), took


async def opened(url: str, rate: float, seconds: float) -> list[float]:
    """Seconds of each request, which come at random times: at this rate of images a second."""
    dice = random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        under_way, ends, seed = list[asyncio.Task[float]](), time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            seed += 1
            under_way.append(asyncio.create_task(ask(session, url, wanted(seed))))
            await asyncio.sleep(dice.expovariate(rate / IMAGES))
        return await asyncio.gather(*under_way)


def wanted(seed: int, **settings: int) -> dict[str, int]:
    """A request."""
    return {"label": seed % 10, "seed": seed, "count": IMAGES, **({"steps": STEPS} if STEPS else {}), **settings}


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Generator[str]:
    """`mlflow models serve` of the pair: the address of its predictions."""
    with tempfile.TemporaryDirectory() as place:
        for part in ("autoencoder", "prior"):
            shutil.copytree(folder / part / "final", Path(place, part, "final"))
        model = Model()
        mlflow.pyfunc.add_to_model(model, "cluster.serving")
        model.save(str(Path(place, "MLmodel")))
        port = free_port()
        command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "-m", place, "-p", str(port)]
        with open(Path(place, "log"), "wb") as log:
            server = subprocess.Popen(
                [*command, "--env-manager", "local"], stdout=log, stderr=log, start_new_session=True
            )
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping"):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            for process in [*psutil.Process(server.pid).children(recursive=True), server]:
                process.send_signal(signal.SIGTERM)
            server.wait(30)


def bare(pair: Pair, size: int, seconds: float) -> float:
    """Images a second of sampling without HTTP."""
    began, drawn = time.perf_counter(), 0
    while (over := time.perf_counter() - began) < seconds or not drawn:
        pair.sample(labels=[n % 10 for n in range(size)], seed=drawn, batch_size=size, steps=STEPS)
        drawn += size
    return drawn / over if over else 0.0


def line(name: str, value: float, unit: str, peer: str = "", ratio: float | None = None, **more: object) -> None:
    """Print one measurement."""
    print(json.dumps({"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio, **more}), flush=True)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(1e3 * cuts[49], 1), "p99_ms": round(1e3 * cuts[98], 1), "requests": len(seconds)}


def replica_memory() -> float:
    """MiB of the process that holds the pair."""
    family = psutil.Process().children(recursive=True)
    [replica] = [each for each in family if "ServeReplica:studio:Replica" in "".join(each.cmdline())]
    return replica.memory_info().rss / 2**20


def main(folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    pair, rates = bld_core.load(str(folder)), dict[Any, list[float]]()
    took: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    source, config = FolderSource("bench", str(folder), "cpu"), ServeConfig(port=free_port())
    with mlflow_server(folder) as peer, studio(source, config, ClusterConfig(workers=1)) as address:
        url = f"{address}v1/samples"
        rows = ({"dataframe_records": [wanted(seed)]} for seed in range(10**6))
        for _ in range(ROUNDS):
            for size in SIZES:
                rates.setdefault(f"bare {size}", []).append(bare(pair, size, seconds))
            rates.setdefault("mlflow", []).append(asyncio.run(closed(peer, rows, 1, seconds))[0])
            for clients in CLIENTS:
                rate, each = asyncio.run(closed(url, map(wanted, range(10**6)), clients, seconds))
                rates.setdefault(clients, []).append(rate)
                took[clients] += each
        medians = {name: statistics.median(each) for name, each in rates.items()}
        size = max(SIZES, key=lambda size: medians[f"bare {size}"])
        limit = medians[f"bare {size}"]
        for clients in CLIENTS:
            name = f"studio, {clients} clients"
            line(
                name,
                medians[clients],
                "images/s",
                f"bare, batch {size}",
                medians[clients] / limit,
                **spread(took[clients]),
            )
        line(
            "bare, the studio's batch",
            medians[f"bare {config.batch}"],
            "images/s",
            f"bare, batch {size}",
            medians[f"bare {config.batch}"] / limit,
        )
        line(
            "studio, 16 clients",
            medians[16],
            "images/s",
            "mlflow models serve, 1 client",
            medians[16] / medians["mlflow"],
        )
        rate = 0.7 * medians[16]
        line("studio, open loop", rate, "images/s", "", None, **spread(asyncio.run(opened(url, rate, 3 * seconds))))
        quick = (wanted(seed, steps=1, count=1) for seed in range(REQUESTS))
        asyncio.run(closed(url, (next(quick) for _ in range(500)), 16, 600))
        before = replica_memory()
        asyncio.run(closed(url, quick, 16, 600))
        after = replica_memory()
        line("memory of the replica after 5,000 requests", after, "MiB", "after 500", after / before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 5.0)
