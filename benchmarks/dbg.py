"""Ingest: images a second of one worker's Ray Data stream, against webdataset with a torch DataLoader.

BLD_REAL_DATA=path/to/shards python benchmarks/ingest.py
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
import webdataset as wds

from bld_core.images import ImageConfig, decode
from bld_core.samples import read_shard, write_shard
from bld_core.skipped import Skipped
from bld_core.training import TrainingConfig
from cluster.experiment import Experiment
from cluster.ingest import Position, image_batches
from cluster.runtime import ClusterConfig, connect

SHARDS, SIZE, BATCH = 8, 128, 64
WARM, TIMED = int(os.environ.get("WARM", 1500)), int(os.environ.get("TIMED", 6000))
REPEATS = int(os.environ.get("REPEATS", 3))
TASKS = int(os.environ.get("TASKS", 2))


def make_data(folder: str) -> ImageConfig:
    source = sorted(Path(os.environ["BLD_REAL_DATA"], "imagenet-160").glob("*.tar"))
    samples = [
        s._replace(key=f"{i}-{s.key}") for i, path in enumerate(source) for s in read_shard(str(path), ["jpg"]).samples
    ]
    for shard in range(SHARDS):
        write_shard(f"{folder}/train-{shard:04d}.tar", samples)
    return ImageConfig(train=f"{folder}/train-{{0000..{SHARDS - 1:04d}}}.tar", image_size=SIZE, extensions=["jpg"])


def rate(sizes: Iterator[int]) -> float:
    seen = 0
    while seen < WARM:
        seen += next(sizes)
    began, seen, c0 = time.perf_counter(), 0, cpu()
    while seen < TIMED:
        seen += next(sizes)
    wall = time.perf_counter() - began
    c1 = cpu()
    d = {}
    for k, (n, t) in c1.items():
        u = t - c0.get(k, (n, 0))[1]
        if u > 0.02:
            d[f"{n}-{k}"] = round(u / seen * 1e6)
    print("   us/img", sum(d.values()), "busy cores", round(sum(d.values()) * seen / 1e6 / wall, 2), d, file=sys.stderr)
    return seen / wall


def cpu():
    import psutil

    me = psutil.Process()
    out = {}
    for p in [me, *me.children(recursive=True)]:
        try:
            t = p.cpu_times()
            c = p.cmdline()
            n = (
                (
                    c[0]
                    if c and c[0].startswith("ray::")
                    else (
                        c[0].split("/")[-1]
                        + (
                            "+" + [x for x in c if x.endswith(".py")][0].split("/")[-1]
                            if any(x.endswith(".py") for x in c)
                            else ""
                        )
                    )
                )
                if c
                else "?"
            )
            out[p.pid] = (n[:40], t.user + t.system)
        except psutil.Error:
            pass
    return out


def ours(data: ImageConfig) -> float:
    experiment = Experiment(
        data=data,
        autoencoder_training=TrainingConfig(batch_size=BATCH),
        cluster=ClusterConfig(decode_tasks=TASKS, read_ahead=int(os.environ.get("AHEAD", 256))),
    )
    connect(experiment.cluster)
    stream = image_batches(experiment, 0, Position(), 0, 1, Skipped())
    t = time.perf_counter()
    next(stream)
    print("  first", time.perf_counter() - t, file=sys.stderr)
    found = rate(len(batch.keys) for batch, _ in stream)
    stream.close()
    time.sleep(1)
    ray.shutdown()
    return found


class Unpack:
    def __init__(self, data):
        self.data = data

    def __call__(self, sample: dict[str, Any]):
        return torch.from_numpy(decode(sample["jpg"], self.data).copy()), int(sample["cls"]), sample["__key__"]


def peer(data: ImageConfig) -> float:
    dataset = (
        wds.WebDataset(data.train, shardshuffle=SHARDS, resampled=False)
        .repeat()
        .shuffle(1000, initial=100)
        .map(Unpack(data))
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=2)
    it = iter(loader)
    found = rate(len(keys) for _, _, keys in it)
    del it
    return found


def alone(data: ImageConfig) -> float:
    samples = read_shard(data.train.replace("{0000..0007}", "0000"), ["jpg"]).samples[:1000]
    began = time.perf_counter()
    for s in samples:
        decode(s.data, data)
    return len(samples) / (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(folder)
        rows = []
        for _ in range(REPEATS):
            row = (alone(data), ours(data), peer(data))
            print(row, row[1] / row[2], file=sys.stderr)
            rows.append(row)
        a, o, p = (statistics.median(c) for c in zip(*rows))
    print(json.dumps({"name": "ingest", "value": o, "unit": "images/s", "peer": p, "ratio": o / p, "alone": a}))


if __name__ == "__main__":
    main()
