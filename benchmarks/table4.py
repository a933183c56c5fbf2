"""Table 4 on small photographs: reconstruction through binary, vector-quantized and continuous latents.

    BLD_REAL_DATA=path/to/shards python benchmarks/table4.py [--sides 8] [--latents binary vector]

The images are `tiny10-64` (64 x 64, colour): the last shard is held out. For each side of the code the three latents
have the same networks, the same steps, the same seed, the same batches and L1 alone; one field of the configuration
differs. Binary codes have c bits, c = 32 at 8 x 8 and 128 at 4 x 4; the vector quantizer has 1,024 entries of c
numbers; the continuous latent has c/2 channels. With `--patch` the first level takes squares of pixels, in all of them;
`--entropy` makes bits sure. `code_bits` is the size of an image's code, `code_bits_entropy` the part of it that is the
encoder's own noise. PSNR and SSIM are those of the averaged weights over the held-out
shard, as uint8. Prints one JSON line for each row, then the table beside the paper's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import Autoencoder, AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.data.images import ImageConfig, first_images
from bld_core.data.tensors import stack
from bld_core.metrics.reconstruction import ReconstructionMetrics
from bld_core.noise import permutation
from bld_core.splitmix import key_of
from bld_core.training.loop import Batch, TrainingConfig, make_state, train

BITS = {8: 32, 4: 128}
MULTIPLIERS = {8: [1, 2, 4, 8], 4: [1, 2, 4, 8, 8]}
# LSUN Bedrooms, 256 x 256, held out: at 16 x 16 and at 8 x 8, as here at 8 x 8 and at 4 x 4.
PAPER = {
    (8, "vector"): "16x16, 1024 entries  20.08/.62",
    (8, "continuous"): "16x16x16  24.08/.70",
    (8, "binary"): "16x16x32  24.02/.75",
    (4, "vector"): "8x8, 2048 entries  17.20/.53",
    (4, "continuous"): "8x8x64  22.74/.62",
    (4, "binary"): "8x8x128  22.82/.64",
}


def load_images(folder: str) -> tuple[Tensor, Tensor]:
    """Training and held-out images, uint8 (N, 64, 64, 3)."""
    config = ImageConfig(image_size=64)
    parts = [
        stack(first_images(f"{folder}/tiny10-64/tiny10-64-{shard}.tar", config, 10**6))
        for shard in ("000[0-1]", "0002")
    ]
    return parts[0], parts[1]


def batches(images: Tensor, size: int) -> Iterator[Batch]:
    """Seeded permutations of the images, laid end to end."""
    labels, keys = torch.full((size,), -1), [""] * size
    for step in itertools.count():
        index = step * size + torch.arange(size)
        rows = torch.cat(
            [
                permutation(0, "table 4", epoch, len(images))[index[index // len(images) == epoch] % len(images)]
                for epoch in (index // len(images)).unique().tolist()
            ]
        )
        yield Batch(images[rows], labels, index, keys)


def reconstructed(autoencoder: Autoencoder, images: Tensor) -> ReconstructionMetrics:
    """What is left of images behind the latent, without its noise."""
    found = ReconstructionMetrics()
    for part in images.split(100):
        found.update(autoencoder, part)
    return found


def row(
    side: int, latent: str, flags: argparse.Namespace, training: TrainingConfig, images: Tensor, held_out: Tensor
) -> dict[str, object]:
    """Train one autoencoder and measure it."""
    entropy = flags.entropy if latent == "binary" else 0.0
    config = AutoencoderConfig(
        bits=BITS[side],
        latent=latent,  # pyright: ignore[reportArgumentType]  # one of the choices of the command line
        codes=flags.codes,
        patch=flags.patch,
        channels=8,
        multipliers=MULTIPLIERS[side][flags.patch.bit_length() - 1 :],
        blocks=1,
        attention=[],
    )
    torch.manual_seed(key_of(0, "initial weights"))
    state = make_state(make_autoencoder(config, 3, entropy), training)
    objective = AutoencoderObjective(
        LossConfig(entropy=entropy),
        config.code_shape(64),
        seed=0,
        fade=training.steps if flags.codes == "fade" else 0,
    )
    began = time.perf_counter()
    for report in train(state, batches(images, training.batch_size), objective, training):
        if report.step % 500 == 0:
            print(f"# {side} x {side} {latent} {report.step} l1 {float(report.terms['l1']):.4f}", flush=True)
    seconds = time.perf_counter() - began
    state.module.load_state_dict(state.averages[0].weights)
    state.module.eval()
    assert isinstance(state.module, Autoencoder)
    found = reconstructed(state.module, held_out)
    quality, size = found.quality, config.code_bits(64)
    health = found.health.metrics() if latent == "binary" else {}
    bits: dict[str, object] = {} if size is None else {"code_bits": size}
    if size is not None and health:
        bits["code_bits_entropy"] = round(size * health["bit_entropy"], 1)
    return {
        "name": f"table4 {side}x{side} {latent}",
        "value": quality.psnr.mean,
        "unit": "dB",
        "std": quality.psnr.deviation,
        "ssim": quality.ssim.mean,
        "ssim_std": quality.ssim.deviation,
        "steps": training.steps,
        "codes": flags.codes,
        "patch": flags.patch,
        "entropy": entropy,
        **bits,
        **health,
        "seconds": round(seconds),
        "peer": PAPER[side, latent],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 4], choices=list(BITS))
    parser.add_argument("--codes", default="sample", choices=["sample", "mode", "fade"], help="how training takes them")
    parser.add_argument("--patch", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument("--entropy", type=float, default=0.0, help="weight of the entropy term of binary codes")
    parser.add_argument("--latents", nargs="+", default=["binary", "vector", "continuous"])
    flags = parser.parse_args()
    images, held_out = load_images(os.environ["BLD_REAL_DATA"])
    training = TrainingConfig(
        steps=flags.steps, batch_size=flags.batch_size, learning_rate=3e-3, warmup=100, decay="cosine", ema_decay=0.995
    )
    rows: list[dict[str, object]] = []
    for side, latent in itertools.product(flags.sides, flags.latents):
        rows.append(row(side, latent, flags, training, images, held_out))
        print(json.dumps(rows[-1]), flush=True)
    print("latent                      PSNR   SSIM    the paper's (LSUN Bedrooms 256x256)")
    for line in rows:
        print(f"{line['name']:<26} {line['value']:6.2f}  {line['ssim']:5.3f}    {line['peer']}")


if __name__ == "__main__":
    main()
