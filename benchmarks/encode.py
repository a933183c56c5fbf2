"""The encode job: its images a second, its memory as the data grow, its driver as the shards grow in number.

    BLD_REAL_DATA=path/to/real/shards python benchmarks/encode.py rate
    BLD_REAL_DATA=path/to/real/shards python benchmarks/encode.py memory
    python benchmarks/encode.py shards

`rate`: photographs at 128 px (imagenet-160, its shards repeated) and a small encoder, for which decoding and encoding
are of the same order, on two cores: one encoder of one thread, two decoding tasks. Compared, in turns, with what each
does alone on one core: decoding in one process, and the encoder's forward pass of images in memory in one thread; the
slower of the two is the limit. The job's clock runs from its first finished shard to its last, without the start of
processes.
`memory`: the peak of the memory of all processes of the job (PSS), Ray's included, at 8 shards and at 64.
`shards`: 2,000 shards of 4 tiny images and a tiny encoder: the driver's CPU time a shard and its memory, in the first
and in the last quarter.

Each prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import ImageConfig, LabelledImage, read_images
from bld_core.data.shards import Sample, write_shard
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack, to_float
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, load_autoencoder
from bld_core.training.checkpoint import save_model
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents
from cluster.runtime import ClusterConfig

PHOTOGRAPHS = "imagenet-160/imagenet1k-160-*.tar"
ENCODER = AutoencoderConfig(bits=32, channels=4, multipliers=[1, 1, 2, 2], blocks=1, attention=[])
TINY = AutoencoderConfig(bits=8, channels=4, multipliers=[1, 1], blocks=1, attention=[])
RATE_SHARDS, REPEATS = 20, 3
MEMORY_SHARDS, GROWTH = 8, 8
MANY, EACH = 2000, 4


def make_experiment(root: str, name: str, train: str, config: AutoencoderConfig, size: int) -> Experiment:
    """An experiment whose autoencoder is as initialised: what its bits say does not change the time."""
    experiment = Experiment(
        root=root,
        name=name,
        data=ImageConfig(train=train, validation=files.expand(train)[0], image_size=size),
        autoencoder=config,
        cluster=ClusterConfig(workers=1, cpus_per_worker=1, decode_tasks=2),
    )
    torch.manual_seed(0)
    facts = {
        "autoencoder": asdict(config),
        "code_shape": experiment.code_shape,
        "image_size": size,
        "channels": experiment.data.channels,
    }
    save_model(files.join(experiment.folder, AUTOENCODER), make_autoencoder(config, 3).state_dict(), facts)
    return experiment


def photographs(root: str, count: int) -> str:
    """A pattern of `count` shards: links to the real ones, again and again."""
    data = os.environ.get("BLD_REAL_DATA")
    if not data:
        raise SystemExit("BLD_REAL_DATA does not name a folder of real image shards")
    real = files.expand(f"{data}/{PHOTOGRAPHS}")
    folder = Path(root, f"photographs-{count}")
    folder.mkdir()
    for i, source in zip(range(count), itertools.cycle(real), strict=False):
        (folder / f"{i:04d}.tar").symlink_to(source)
    return f"{folder}/{{0000..{count - 1:04d}}}.tar"


def decoding_rate(experiment: Experiment) -> float:
    """Images a second of decoding in this process."""
    began = time.perf_counter()
    images = sum(1 for url in files.expand(experiment.data.train)[:4] for _ in read(url, experiment))
    return images / (time.perf_counter() - began)


def read(url: str, experiment: Experiment) -> Iterator[LabelledImage]:
    """The images of a shard."""
    return read_images(url, experiment.data, Skipped())


def forward_rate(experiment: Experiment) -> float:
    """Images a second of the encoder's forward pass in one thread."""
    torch.set_num_threads(1)
    encoder = load_autoencoder(experiment.folder).network
    images = stack(list(itertools.islice(read(files.expand(experiment.data.train)[0], experiment), 192)))
    began = 0.0
    with torch.no_grad():
        for i, batch in enumerate([*images.split(experiment.latents.batch_size)] * 3):
            if i == 1:
                began = time.perf_counter()
            encoder.encode(to_float(batch))
    return (3 * len(images) - experiment.latents.batch_size) / (time.perf_counter() - began)


def job_rate(experiment: Experiment) -> float:
    """Images a second of the job, from its first finished shard to its last, read off the times of its files."""
    manifest = files.read_json(f"{encode_latents(experiment, fresh=True)}/manifest.json")
    done = sorted(
        (Path(experiment.folder, "latents", entry["file"]).stat().st_mtime, entry["rows"])
        for entry in manifest["files"]
    )
    return sum(rows for _, rows in done[1:]) / (done[-1][0] - done[0][0])


def rate(root: str) -> dict[str, object]:
    """How fast the job is."""
    experiment = make_experiment(root, "rate", photographs(root, RATE_SHARDS), ENCODER, 128)
    figures: dict[str, list[float]] = {"decoding": [], "forward": [], "job": []}
    for _ in range(REPEATS):
        figures["decoding"].append(decoding_rate(experiment))
        figures["forward"].append(forward_rate(experiment))
        figures["job"].append(job_rate(experiment))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    peer = min(medians["decoding"], medians["forward"])
    return line("encode rate", medians["job"], "images/s", peer) | medians


def line(name: str, value: float, unit: str, peer: float) -> dict[str, object]:
    """What is printed."""
    return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": value / peer}


def family_megabytes() -> float:
    """PSS of this process and all that come from it: each shared page is counted once."""
    parents = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/stat")}
    children: dict[int, list[int]] = {}
    for pid, path in parents.items():
        try:
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            total += int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue
    return total / 1024


class Sampler(threading.Thread):
    """Takes a sample every so often until the block ends."""

    def __init__(self, take: Callable[[], Any], seconds: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[Any] = []
        self._take, self._seconds, self._over = take, seconds, threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._seconds):
            self.samples.append(self._take())

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def memory(root: str) -> dict[str, object]:
    """How the job's memory grows with the data."""
    peaks: list[float] = []
    for count in (MEMORY_SHARDS, MEMORY_SHARDS * GROWTH):
        experiment = make_experiment(root, f"memory-{count}", photographs(root, count), ENCODER, 128)
        with Sampler(family_megabytes, 0.3) as sampler:
            encode_latents(experiment)
        ray.shutdown()
        peaks.append(max(sampler.samples))
    return line(f"encode memory at {GROWTH}x data", peaks[1], "MB", peaks[0])


def shards(root: str) -> dict[str, object]:
    """How the driver's time and memory go on over many shards."""
    image = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(image, "PNG")
    for i in range(MANY):
        write_shard(f"{root}/tiny/{i:04d}.tar", [Sample(f"{i}-{k}", "png", image.getvalue(), -1) for k in range(EACH)])
    experiment = make_experiment(root, "shards", f"{root}/tiny/{{0000..{MANY - 1:04d}}}.tar", TINY, 8)
    folder = Path(experiment.folder, "latents/train")

    def look() -> tuple[int, float, float]:
        """Shards done, the driver's CPU seconds, its memory in MB."""
        done = len(os.listdir(folder)) if folder.exists() else 0
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return done, time.process_time(), resident

    with Sampler(look, 0.25) as sampler:
        encode_latents(experiment)
    samples = np.asarray(sampler.samples)
    milliseconds, resident = zip(*(quarter(samples, start) for start in (0, MANY * 3 // 4)), strict=True)
    more = {"first_quarter_MB": resident[0], "last_quarter_MB": resident[1]}
    return line("encode driver, last quarter of 2,000 shards", milliseconds[1], "ms/shard", milliseconds[0]) | more


def quarter(samples: np.ndarray[tuple[int, ...], np.dtype[np.float64]], start: int) -> tuple[float, float]:
    """CPU milliseconds a shard, and the most memory, while the quarter of the shards from `start` on was done."""
    here = samples[(samples[:, 0] > start) & (samples[:, 0] <= start + MANY // 4)]
    done, seconds, _ = here[-1] - here[0]
    return 1000 * seconds / done, here[:, 2].max()


MODES = {"rate": rate, "memory": memory, "shards": shards}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(MODES))
    mode = parser.parse_args().mode
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(MODES[mode](root)))
        ray.shutdown()
