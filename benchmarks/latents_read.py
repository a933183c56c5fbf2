"""Packed rows a second through the prior's loader, against numpy alone on the same bytes in the same random order.

    python benchmarks/latents_read.py [--rows 60000] [--batch-size 256]

Codes of 16 x 16 x 32 bits in shards of 5,000 rows, one thread. The loader gives what training takes: bits as bytes,
labels, sample indices, keys. Its peer is `numpy.memmap` of the packed rows and `numpy.unpackbits`, in the order of the
loader's first epoch. Each holds a batch until it has the next, as training does. They take turns, and the fastest of
each count, for other work on the machine only adds; the bytes are in memory (the page cache) by then. Prints one JSON
line for the set in memory, in turns of 50 steps, and one for a set that streams, a fifth of it in memory at a time,
every file read in each epoch and checked in the first, in turns of whole epochs. `share_of_step` is the loader's share
of a training step of the paper's prior at 45 % of the 989 TFLOP/s of a GPU; that step is worked out, not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bld_core.latents.loader import latent_batches
from bld_core.latents.reader import Latents, open_latents
from bld_core.latents.writer import MANIFEST, LatentRows, Manifest, describe_file, latent_shard_bytes
from bld_core.storage import files
from bld_core.training.loop import TrainingConfig

SHAPE = (16, 16, 32)
WIDTH = 1024
ROWS_A_SHARD = 5000
STEP_SECONDS_A_ROW = 3 * 2 * 46e9 / (0.45 * 989e12)  # forward and backward passes are three times 46 GMAC


def write_data_set(folder: str, rows: int) -> None:
    """Shards of random bits with their manifest, and the same bytes in one flat file."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    with open(f"{folder}/flat", "wb") as flat:
        for shard, start in enumerate(range(0, rows, ROWS_A_SHARD)):
            count = min(ROWS_A_SHARD, rows - start)
            bits = torch.randint(0, 256, (count, WIDTH), generator=generator, dtype=torch.uint8)
            keys = [f"{row:08d}" for row in range(start, start + count)]
            data = latent_shard_bytes(LatentRows(keys, [0] * count, [0] * count, [0] * count, bits), {"shape": SHAPE})
            name = f"train-{shard:04d}.parquet"
            files.write_bytes(f"{folder}/{name}", data)
            entries.append(describe_file(name, data, count, f"train-{shard:04d}.tar", "train", {}))
            flat.write(bits.numpy().tobytes())
    files.write_json(f"{folder}/{MANIFEST}", Manifest(shape=SHAPE, files=entries).to_json())


def numpy_batches(flat: str, latents: Latents, training: TrainingConfig) -> Iterator[np.ndarray[Any, Any]]:
    """The same batches, only the bits, without end."""
    packed, size = np.memmap(flat, np.uint8, "r", shape=(len(latents), WIDTH)), training.batch_size
    first = itertools.islice(latent_batches(latents, training, 0, 0), len(latents) // size)
    orders = [np.array([int(key) for key in batch.keys]) for batch in first]  # a key is the number of its row
    while True:
        for rows in orders:
            yield np.unpackbits(packed[rows], axis=1)


def seconds(batches: Iterator[Any], steps: int) -> float:
    """How long the next `steps` batches take."""
    held: Any = None
    began = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        held = batch
    del held
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=256)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    training = TrainingConfig(batch_size=flags.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(folder, flags.rows)
        latents = open_latents(folder)
        whole = flags.rows * WIDTH / 1e9
        epoch = flags.rows // flags.batch_size
        for name, memory_gb, turns, steps in (("in memory", 10 * whole, 200, 50), ("streamed", whole / 5, 12, epoch)):
            ours = latent_batches(latents, training, 0, 0, latents_gb=memory_gb)
            theirs = numpy_batches(f"{folder}/flat", latents, training)
            assert (next(ours).data.numpy().flatten() == next(theirs).flatten()).all() or name == "streamed"
            times = [(seconds(ours, steps), seconds(theirs, steps)) for _ in range(turns)]
            rows = steps * flags.batch_size
            value, peer = (rows / min(taken) for taken in zip(*times, strict=True))
            line = {"name": f"latents_read {name}", "value": value, "unit": "rows/s", "peer": peer}
            line |= {"ratio": value / peer, "share_of_step": 1 / value / STEP_SECONDS_A_ROW}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
