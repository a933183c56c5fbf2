"""What groups of 8 bits cost beside single bits: seconds of a reverse step, of the bound, and of a training step.

    python benchmarks/groups.py [--size paper small] [--batch-size 1] [--codes 4] [--repeats 3]

The prior is the paper's, 24 x 768 x 12 on 16 x 16 tokens of 32 bits, or that of `configs/fashion_mnist.yaml`, 6 x 192 x
6 on 4 x 4 such tokens; both with the later trunk, their weights random, which changes no time. A step is one of the
reverse process, codes alone; a bound is that of all T steps; a training step is of batches as large as the codes.
Prints one JSON line for each; the peer is the same with group 1, run in turns with it.
"""

from __future__ import annotations

import argparse
import json
from itertools import repeat

import torch
from timing import in_turns  # pyright: ignore[reportImplicitRelativeImport]  # a script imports what lies beside it

from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import SampleSpec, SamplingConfig
from bld_core.prior.binary import BinaryModel
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Batch, TrainingConfig, make_state, train

SIZES = {"paper": (24, 768, 12, 256), "small": (6, 192, 6, 16)}
_STEPS, _BITS = 16, 32


class Case:
    """One prior, and the work that is timed."""

    def __init__(self, size: str, group: int, batch: int, codes: int) -> None:
        layers, width, heads, tokens = SIZES[size]
        prior = PriorConfig(layers=layers, width=width, heads=heads, group=group)
        torch.manual_seed(0)
        self.model = BinaryModel(prior, DiffusionConfig(steps=256), tokens, _BITS)
        self.network = self.model.network().eval()
        z = torch.randint(0, 2, (codes, tokens, _BITS), dtype=torch.uint8)
        self.codes, self.samples = CodeBatch.numbered(z), SampleSpec(torch.arange(batch), None, 0)
        data = Batch(z, torch.full((codes,), -1), torch.arange(codes), [str(number) for number in range(codes)])
        config = TrainingConfig(steps=1000, batch_size=codes, log_every=1000)
        state = make_state(self.model.network(), config)
        self.training = train(state, repeat(data), self.model.objective(0), config)

    def sample(self) -> None:
        """Samples of 16 reverse steps, not decoded."""
        self.model.sample(self.network, self.samples, SamplingConfig(steps=_STEPS))

    def bound(self) -> None:
        """The bound of the codes."""
        self.model.bound(self.network, self.codes, 0)

    def train(self) -> None:
        """One training step."""
        next(self.training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--codes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    for size in flags.size:
        single, joint = (Case(size, group, flags.batch_size, flags.codes) for group in (1, 8))
        for name, share in (("sample", flags.batch_size * _STEPS), ("bound", flags.codes), ("train", flags.codes)):
            works = [getattr(case, name) for case in (single, joint)]
            in_turns(works, 1)  # warms the caches
            peer, value = (spent / share for spent in in_turns(works, flags.repeats))
            unit = {"sample": "s/step/sample", "bound": "s/code", "train": "s/step/code"}[name]
            line = {"name": f"groups {size} {name}", "value": value, "unit": unit, "peer": peer, "ratio": value / peer}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
