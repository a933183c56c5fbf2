"""What checkpoints cost a training: written beside it from a copy in host memory, and written while it waits.

    python benchmarks/checkpoint.py [--width 384] [--steps 24] [--every 6] [--repeats 3] [--device cpu] [--folder URL]

A prior of 12 blocks takes the same steps without checkpoints, with one after every few that training waits for, and
with the same written in the background, in turns; one thread computes, and the other core is free, as beside a GPU.
The last write is waited for within the clock. Prints one JSON line: the share of the training's time that checkpoints
cost in the background ("value") and in the foreground ("peer"), what one holds, and for how long training stands still
for each of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from timing import in_turns, seconds  # pyright: ignore[reportImplicitRelativeImport]

from bld_core.diffusion.process import DiffusionConfig
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import Prior, PriorConfig
from bld_core.storage import files
from bld_core.training.checkpoint import save_state, snapshot
from bld_core.training.loop import Batch, TrainingConfig, TrainState, make_state, train
from cluster.training.checkpoints import Keeper, checkpoint_name, checkpoints

TOKENS, BITS, BATCH = 64, 32, 8


def batches(device: str) -> Iterator[Batch]:
    """Random codes."""
    codes = torch.randint(0, 2, (BATCH, TOKENS, BITS), device=device)
    for step in itertools.count():
        index = torch.arange(step * BATCH, (step + 1) * BATCH, device=device)
        yield Batch(codes, torch.full((BATCH,), -1, device=device), index, [""] * BATCH)


def run(state: TrainState, config: TrainingConfig, device: str, way: str, folder: str, waits: list[float]) -> None:
    """Some steps, with checkpoints in one of the ways; appends the seconds for which each of them stops training."""
    state.step = 0
    objective = PriorObjective(DiffusionConfig(), PriorConfig(), 0)
    with Keeper(folder) as keeper:
        for report in train(state, batches(device), objective, config):
            if way == "none" or report.step % config.checkpoint_every:
                continue
            began = time.perf_counter()
            if way == "background":
                keeper.wait()
                keeper.keep(snapshot(state, {}))
            else:
                save_state(files.join(folder, checkpoint_name(report.step)), state, {})
                for old in checkpoints(folder)[:-2]:
                    files.remove(old)
            waits.append(time.perf_counter() - began)
        keeper.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", default="", help="where checkpoints go, also a URL; by default a temporary folder")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainingConfig(steps=flags.steps, checkpoint_every=flags.every)
    network = Prior(PriorConfig(layers=12, width=flags.width, heads=6), TOKENS, BITS).to(flags.device)
    state = make_state(network, config)
    with tempfile.TemporaryDirectory() as temporary:
        folder, waits = flags.folder or temporary, {way: list[float]() for way in ("none", "foreground", "background")}
        runs = [partial(run, state, config, flags.device, way, folder, waits[way]) for way in waits]
        seconds(runs[0], flags.device)  # warms up, and gives the optimizer its moments
        none, foreground, background = in_turns(runs, flags.repeats, flags.device)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2 if not flags.folder else 0
    line = {
        "name": f"checkpoint, every {flags.every} steps of {none / flags.steps:.2f} s",
        "value": 1 - none / background,
        "unit": "of the training's time",
        "peer": 1 - none / foreground,
        "ratio": (background - none) / (foreground - none),
        "megabytes": size / 1e6,
        "waits": {way: statistics.median(times) for way, times in waits.items() if times},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
