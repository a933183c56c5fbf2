"""Ingest: images a second of one worker's Ray Data stream, against webdataset with a torch DataLoader.

    BLD_REAL_DATA=path/to/shards python benchmarks/ingest.py speed
    BLD_REAL_DATA=path/to/shards python benchmarks/ingest.py memory

speed: photographs (imagenet-160, eight shards of all of them), decoded to 128 x 128 by the same function, shuffled, in
batches of 64, on two decoding processes: our stream and webdataset's in turns, Ray started for each of our turns and
stopped before the other's; and that function alone in one process, the limit. The clock starts when both run steadily.
Prints two JSON lines: the median of our images a second against the median of webdataset's, and against twice the
median of the function alone.

memory: one epoch of the stream over a data set and over one eight times as large. Prints one JSON line: the peak
resident memory (PSS) of this process and all of Ray's with the large set, and with the small one as its peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from webdataset.compat import WebDataset, WebLoader

from bld_core.data.images import ImageConfig, decode
from bld_core.data.shards import read_shard, write_shard
from bld_core.data.skipped import Skipped
from bld_core.storage import files
from bld_core.training.loop import TrainingConfig
from cluster.config.experiment import Experiment
from cluster.data.ingest import Position, image_batches
from cluster.runtime import ClusterConfig, connect_ray

SHARDS, SIZE, BATCH, PROCESSES = 8, 128, 64, 2
WARM_IMAGES, IMAGES, ALONE_IMAGES, REPEATS = 6000, 12000, 1000, 5
GROWTH = 8


def make_shards(folder: str, shards: int) -> ImageConfig:
    """The first shards are written; further ones are links to them."""
    sources = files.expand(f"{os.environ['BLD_REAL_DATA']}/imagenet-160/*.tar")
    samples = [
        sample._replace(key=f"{i}-{sample.key}")
        for i, source in enumerate(sources)
        for sample in read_shard(source, ["jpg"]).samples
    ]
    for i in range(shards):
        url = f"{folder}/train-{i:04d}.tar"
        if i < SHARDS:
            write_shard(url, samples)
        else:
            os.link(f"{folder}/train-{i % SHARDS:04d}.tar", url)
    return ImageConfig(train=f"{folder}/train-{{0000..{shards - 1:04d}}}.tar", image_size=SIZE, extensions=["jpg"])


def steady_rate(sizes: Iterator[int]) -> float:
    """Images a second, the first ones not counted."""
    seen = 0
    while seen < WARM_IMAGES:
        seen += next(sizes)
    began, seen = time.perf_counter(), 0
    while seen < IMAGES:
        seen += next(sizes)
    return seen / (time.perf_counter() - began)


def ray_sizes(data: ImageConfig) -> Generator[int]:
    """Batch sizes of our stream, while Ray runs."""
    experiment = Experiment(
        data=data,
        autoencoder_training=TrainingConfig(batch_size=BATCH),
        cluster=ClusterConfig(decode_tasks=PROCESSES),
    )
    connect_ray(experiment.cluster)
    stream = image_batches(experiment, 0, Position(), 0, 1, Skipped())
    try:
        for batch, _ in stream:
            yield len(batch.keys)
    finally:
        del stream
        ray.shutdown()


def _unpack(data: ImageConfig, sample: dict[str, Any]) -> tuple[Tensor, int, str]:
    return torch.from_numpy(decode(sample["jpg"], data).copy()), int(sample["cls"]), sample["__key__"]


def webdataset_sizes(data: ImageConfig) -> Generator[int]:
    """Batch sizes of webdataset's stream."""
    dataset: Any = WebDataset(data.train, shardshuffle=SHARDS)
    dataset = dataset.repeat().shuffle(1000).map(partial(_unpack, data)).batched(BATCH)
    for pixels, _, _ in WebLoader(dataset, batch_size=None, num_workers=PROCESSES):
        yield len(pixels)


def alone_rate(data: ImageConfig) -> float:
    """Images a second of the decoding function in this process."""
    samples = read_shard(files.expand(data.train)[0], ["jpg"]).samples[:ALONE_IMAGES]
    began = time.perf_counter()
    for sample in samples:
        decode(sample.data, data)
    return len(samples) / (time.perf_counter() - began)


def speed(folder: str) -> None:
    data = make_shards(folder, SHARDS)
    rates: dict[str, list[float]] = {"ours": [], "webdataset": [], "alone": []}
    for _ in range(REPEATS):
        rates["alone"].append(alone_rate(data))
        for name, sizes in (("ours", ray_sizes(data)), ("webdataset", webdataset_sizes(data))):
            rates[name].append(steady_rate(sizes))
            sizes.close()
    ours, theirs, alone = (statistics.median(rates[name]) for name in ("ours", "webdataset", "alone"))
    for name, peer in (("ingest, webdataset", theirs), (f"ingest, PIL x {PROCESSES}", PROCESSES * alone)):
        print(json.dumps({"name": name, "value": ours, "unit": "images/s", "peer": peer, "ratio": ours / peer}))


def resident_mib() -> float:
    """PSS of this process and all that it has started."""
    kib, family = 0, [os.getpid()]
    for pid in family:  # which grows as it is walked
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                family += map(int, children.read_text().split())
        except OSError:  # it has ended
            continue
        kib += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return kib / 1024


def peak_mib(data: ImageConfig, images: int) -> float:
    """Peak memory while that many images stream past."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    sizes, seen = ray_sizes(data), 0
    while seen < images:
        seen += next(sizes)
    done.set()
    watcher.join()
    sizes.close()
    return peak


def memory(folder: str) -> None:
    large = make_shards(folder, GROWTH * SHARDS)
    small = ImageConfig(train=f"{folder}/train-{{0000..{SHARDS - 1:04d}}}.tar", image_size=SIZE, extensions=["jpg"])
    images = SHARDS * len(read_shard(files.expand(small.train)[0], ["jpg"]).samples)
    before, after = peak_mib(small, images), peak_mib(large, GROWTH * images)
    line = {"name": "ingest memory", "value": after, "unit": "MiB", "peer": before, "ratio": after / before}
    print(json.dumps(line))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        (speed if parser.parse_args().what == "speed" else memory)(scratch)
