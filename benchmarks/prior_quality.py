"""What a prior has learned after so many steps, and seconds: the paper's recipe beside those that follow it.

    python benchmarks/prior_quality.py --experiment runs/fashion_mnist [--lengths 300 1200] [--recipes paper new]
        [--seeds 0] [--rate 0.004] [--keep runs/prior_quality]

Each recipe is trained on the experiment's latents to its own end at each length (4 blocks of width 128, batch 64,
T = 256), then its likelihood bound is measured on 256 held-out codes, of all steps and of 64, 16, 8 and 4: in bits a
bit, all with the same codes and noise. "multiply_adds" are those of one code's pass through the network, "seconds" are
of training alone. What is measured is kept, so that an interrupted call goes on. Prints one JSON line for each
training; the peer is the paper's recipe at the same length where that is asked for, too.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.latents.loader import latent_batches
from bld_core.latents.reader import open_splits
from bld_core.prior.binary import BinaryModel
from bld_core.prior.transformer import PriorConfig
from bld_core.training.averages import Ema
from bld_core.training.loop import TrainingConfig, make_state, train

_GRIDS = (64, 16, 8, 4)
_HELD_OUT = 256


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    prior: PriorConfig
    diffusion: DiffusionConfig
    training: TrainingConfig


_PLAIN = PriorConfig(layers=4, width=128, heads=4, classes=10, trunk=[])
_MODERN = replace(_PLAIN, trunk=["rms_norm", "qk_norm", "swiglu", "adaln"])
_Z0 = DiffusionConfig(steps=256)
_ADAMW = TrainingConfig(batch_size=64, learning_rate=1e-3, decay="cosine", ema_decay=0.998)
_MUON = replace(_ADAMW, optimizer="muon", learning_rate=4e-3, decay="linear")

RECIPES = {
    "paper": Recipe(_PLAIN, replace(_Z0, target="flip"), _ADAMW),
    "plain adamw": Recipe(_PLAIN, _Z0, replace(_ADAMW, learning_rate=4e-3)),
    "plain muon": Recipe(_PLAIN, _Z0, _MUON),
    "modern adamw": Recipe(_MODERN, _Z0, replace(_ADAMW, learning_rate=4e-3)),
    "modern muon": Recipe(_MODERN, _Z0, _MUON),
    "modern muon flip": Recipe(_MODERN, replace(_Z0, target="flip"), _MUON),
    "new": Recipe(replace(_MODERN, group=8), _Z0, _MUON),
    **{f"class tokens {count}": Recipe(replace(_MODERN, group=8, class_tokens=count), _Z0, _MUON)
       for count in (1, 4)},
    **{f"without {part}": Recipe(replace(_MODERN, trunk=[p for p in _MODERN.trunk if p != part]), _Z0, _MUON)
       for part in _MODERN.trunk},
    "with rotary": Recipe(replace(_MODERN, trunk=[*_MODERN.trunk, "rotary"]), _Z0, _MUON),
}  # fmt: skip


def measure(recipe: Recipe, latents: str, steps: int, seed: int) -> dict[str, Any]:
    """Train a recipe to its end; its bounds, the seconds of training and the cost of a pass."""
    learned, held_out = open_splits(latents, "train", "validation")
    h, w, c = learned.manifest.shape
    model = BinaryModel(recipe.prior, recipe.diffusion, h * w, c)
    torch.manual_seed(seed)
    network = model.network()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.zeros(1, h * w, c), torch.ones(1))
    config = replace(recipe.training, steps=steps, warmup=min(100, steps // 6))
    state = make_state(network, config)
    batches = latent_batches(learned, config, seed, 0)
    began = time.perf_counter()
    for _ in train(state, batches, model.objective(seed), config):
        pass
    spent = time.perf_counter() - began
    average: Ema = state.averages[0]
    network.load_state_dict(average.weights)
    network.eval()
    codes = CodeBatch.numbered(*held_out.read().part(slice(_HELD_OUT), torch.device("cpu")))
    bound = model.bound(network, codes, 0)
    grids = {str(n): model.bound(network, codes, 0, SamplingConfig(steps=n)).bits_per_bit for n in _GRIDS}
    return {
        "bound": bound.bits_per_bit,
        "standard_error": bound.standard_error,
        "bound_of_steps": grids,
        "seconds": spent,
        "multiply_adds": counter.get_total_flops() // 2,
        "parameters": sum(weight.numel() for weight in network.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="folder with latents/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 600, 1200, 3000])
    parser.add_argument("--recipes", nargs="+", default=["paper", "new"], choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, help="learning rate in place of the recipe's")
    parser.add_argument("--width", type=int, help="in place of 128")
    parser.add_argument("--keep", default="", help="folder of what is measured; by default within the experiment")
    flags = parser.parse_args()
    kept = Path(flags.keep or f"{flags.experiment}/prior_quality")
    kept.mkdir(parents=True, exist_ok=True)
    for steps, seed, name in product(flags.lengths, flags.seeds, flags.recipes):
        recipe = RECIPES[name]
        if flags.rate:
            recipe = replace(recipe, training=replace(recipe.training, learning_rate=flags.rate))
        if flags.width:
            recipe = replace(recipe, prior=replace(recipe.prior, width=flags.width))
        rate, width = recipe.training.learning_rate, recipe.prior.width
        file = kept / f"{name.replace(' ', '-')}-{width}-{rate:g}-{steps}-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(measure(recipe, f"{flags.experiment}/latents", steps, seed)))
        found = json.loads(file.read_text())
        paper = kept / f"paper-{width}-{RECIPES['paper'].training.learning_rate:g}-{steps}-{seed}.json"
        peer = json.loads(paper.read_text())["bound"] if paper.exists() else None
        line = {"name": f"prior_quality {name}, {steps} steps", "value": found["bound"], "unit": "bits/bit"}
        line |= {"peer": peer, "ratio": found["bound"] / peer if peer else None}
        line |= {"rate": rate, "width": width, "seed": seed, **found}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
