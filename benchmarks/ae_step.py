"""A training step of the autoencoder at the paper's 256 x 256 configuration, networks and L1 only, on this CPU.

    python benchmarks/ae_step.py [--batch-size 1] [--steps 3] [--modes float32 bfloat16 ...]

Compares, in turns, plain float32 with bfloat16 autocast, with channels_last and with torch.compile, each a field of the
training configuration. The limit is this CPU's matrix rate, measured beside it: a step is three times the forward
pass's multiply-adds. Prints one JSON line for each mode: median seconds a step, ratio to float32, share of that rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from timing import matrix_rate

from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.training.loop import Batch, TrainingConfig, make_state, train

SIZE = 256
GMAC = 69.5 + 94.9  # of encoder and decoder, one image forward
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 channels_last": {"channels_last": True},
    "float32 channels_last compiled": {"channels_last": True, "compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 channels_last": {"precision": "bfloat16", "channels_last": True},
    "bfloat16 channels_last compiled": {"precision": "bfloat16", "channels_last": True, "compile": True},
}


def batches(size: int) -> Iterator[Batch]:
    """Noise: what an image shows does not change the time."""
    images = torch.randint(0, 256, (size, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0)).byte()
    for step in itertools.count():
        yield Batch(images, torch.full((size,), -1), step * size + torch.arange(size), [""] * size)


def seconds_a_step(mode: str, batch_size: int, steps: int) -> float:
    """The median over `steps` steps, after two that are not counted."""
    config = AutoencoderConfig()
    training = TrainingConfig(steps=steps + 2, batch_size=batch_size, **MODES[mode])
    torch.manual_seed(0)
    state = make_state(make_autoencoder(config, 3), training)
    objective = AutoencoderObjective(LossConfig(), config.code_shape(SIZE), seed=0)
    times: list[float] = []
    began = time.perf_counter()
    for _ in train(state, batches(batch_size), objective, training):
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    flags = parser.parse_args()
    peer = 0.0
    for mode in flags.modes:
        value = seconds_a_step(mode, flags.batch_size, flags.steps)
        peer = peer or value
        rate = 3 * GMAC * flags.batch_size / value
        limit = matrix_rate(torch.bfloat16 if mode.startswith("bf") else torch.float32)
        line = {"name": f"ae_step {mode}", "value": value, "unit": "s/step", "peer": peer, "ratio": peer / value}
        print(json.dumps(line | {"gmac_per_s": rate, "matrix_rate": limit, "share": rate / limit}), flush=True)


if __name__ == "__main__":
    main()
