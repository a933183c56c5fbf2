"""Seconds a sample at the paper's size, decoding included, beside the bare passes of the two networks.

    python benchmarks/sampler.py [--steps 16 64] [--modes float32 bfloat16] [--device cpu] [--batch-size 1]

The prior is the paper's, 24 x 768 x 12 on 16 x 16 tokens of 32 bits, 171.5M; the decoder is the paper's at 256 x 256;
their weights are random, which changes no time. The peer of a line is as many passes of the same prior and one of the
same decoder: what the sampler takes beyond it is its own doing. "speedup" is to plain float32, run beside it. Prints
one JSON line for each mode and number of steps.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from timing import in_turns  # pyright: ignore[reportImplicitRelativeImport]  # a script imports what lies beside it
from torch import nn

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.generator import Generator
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.trained import AutoencoderRecord, PriorRecord, TrainedAutoencoder, TrainedPrior

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 compiled": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 compiled": {"precision": "bfloat16", "compile": True},
}


def untrained(autoencoder: AutoencoderConfig, prior: PriorConfig, image_size: int, device: str) -> Generator:
    """An untrained pair."""
    torch.manual_seed(0)
    diffusion, shape = DiffusionConfig(), autoencoder.code_shape(image_size)
    model = make_model(prior, diffusion, shape[0] * shape[1], shape[2])
    first = AutoencoderRecord(hash="", autoencoder=autoencoder, code_shape=shape, image_size=image_size, channels=3)
    second = PriorRecord(hash="", prior=prior, diffusion=diffusion, sampling=SamplingConfig())
    pair = TrainedAutoencoder(make_autoencoder(autoencoder, 3).to(device).eval(), first)
    return Generator(pair, TrainedPrior(stirred(model.network()).to(device).eval(), second, model), device)


@torch.no_grad()
def stirred(network: nn.Module) -> nn.Module:
    """A new network with noise on its weights: the last of them are 0, and would make all that it says so."""
    for weights in network.parameters():
        weights.add_(0.05 * torch.randn_like(weights))
    return network


@torch.no_grad()
def measure(generator: Generator, settings: dict[str, Any], steps: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of drawing a batch, of its bare passes, and of drawing it in plain float32."""
    device = generator.device
    assert generator.prior is not None
    prior, autoencoder = generator._networks(  # pyright: ignore[reportPrivateUsage]  # the very copies that draw
        generator.prior, SamplingConfig(**settings)
    )
    h, w, c = autoencoder.code_shape
    z, time = torch.zeros(batch, h * w, c, device=device), torch.full((batch,), 0.5, device=device)

    def passes() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.get("precision") == "bfloat16"):
            for _ in range(steps):
                prior.network(z, time, None)
            autoencoder.decode(z.view(batch, h, w, c))

    def draw() -> None:
        generator.sample(batch, steps=steps, batch_size=batch, **settings)

    def draw_plain() -> None:
        generator.sample(batch, steps=steps, batch_size=batch)

    works = [draw, passes, draw_plain] if settings else [draw, passes]
    generator.sample(batch, steps=2, batch_size=batch, **settings)  # compiles, and warms the caches
    value, peer, *plain = in_turns(works, repeats, device.type)
    return {
        "value": value / batch,
        "unit": "s/sample",
        "peer": peer / batch,
        "ratio": peer / value,
        "overhead": value / peer - 1,
        "speedup": plain[0] / value if plain else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--modes", nargs="+", default=["float32", "bfloat16"], choices=list(MODES))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    flags = parser.parse_args()
    generator = untrained(AutoencoderConfig(), PriorConfig(), 256, flags.device)
    for mode in flags.modes:
        for batch in flags.batch_size:
            for steps in flags.steps:
                print(json.dumps(measure(generator, mode, steps, batch, flags.repeats)), flush=True)


if __name__ == "__main__":
    main()
