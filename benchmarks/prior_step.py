"""A training step of the prior at the paper's size, on cached latents: images a second, and where the time goes.

    python benchmarks/prior_step.py [--batch-size 2] [--steps 3] [--modes float32 bfloat16] [--device cpu]

The prior is the paper's, 24 x 768 x 12 on 16 x 16 tokens of 32 bits, 171.5M; the latents are 70,000 rows of random
bits, as many as FFHQ has. The peer is this machine's matrix rate, measured beside it: a step is three times the
forward pass's multiply-adds. "loader" is the share of a step that the batch takes: permutation, rows, unpacked bits.
Prints one JSON line for each mode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from typing import Any

import torch
from latents_read import write_data_set  # pyright: ignore[reportImplicitRelativeImport]
from timing import matrix_rate, seconds  # pyright: ignore[reportImplicitRelativeImport]

from bld_core.diffusion.process import DiffusionConfig
from bld_core.latents.loader import latent_batches
from bld_core.latents.reader import Latents, open_latents
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import Prior, PriorConfig
from bld_core.training.loop import TrainingConfig, make_state, train

GMAC = 45.9  # of one code forward
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 compiled": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 compiled": {"precision": "bfloat16", "compile": True},
}


def measure(mode: str, batch_size: int, steps: int, latents: Latents, device: str) -> dict[str, Any]:
    """The median of `steps` steps, after two that are not counted, and of as many batches alone."""
    config = TrainingConfig(steps=steps + 2, batch_size=batch_size, **MODES[mode])
    torch.manual_seed(0)
    state = make_state(Prior(PriorConfig(trunk=[]), 256, 32).to(device), config)
    batches = latent_batches(latents, config, 0, 0, device=torch.device(device))
    loop = train(state, batches, PriorObjective(DiffusionConfig(), PriorConfig(trunk=[]), 0), config)
    step = statistics.median([seconds(lambda: next(loop), device) for _ in range(steps + 2)][2:])
    loader = statistics.median([seconds(lambda: next(batches), device) for _ in range(20)])
    limit = matrix_rate(torch.bfloat16 if "precision" in MODES[mode] else torch.float32, device)
    rate = 3 * GMAC * batch_size / step
    return {
        "name": f"prior_step {mode}, batch {batch_size}",
        "value": batch_size / step,
        "unit": "images/s",
        "peer": limit / (3 * GMAC),
        "ratio": rate / limit,
        "gmac_per_s": rate,
        "matrix_rate": limit,
        "loader": loader / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["float32", "bfloat16"], choices=list(MODES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(folder, 70_000)
        latents = open_latents(folder)
        for mode in flags.modes:
            print(json.dumps(measure(mode, flags.batch_size, flags.steps, latents, flags.device)), flush=True)


if __name__ == "__main__":
    main()
