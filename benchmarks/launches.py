"""Operations that the host dispatches in a training step of both stages, and in a step of the sampler; eager.

    python benchmarks/launches.py

Each is about one kernel of a GPU. Views launch nothing, and are not counted; what works on a list of tensors (the
optimizer, the averages) counts once. On a CPU, as here, gradients are clipped one by one, in two operations each; on a
GPU as a list. The networks are the paper's at 256 x 256; they are fake tensors, of which no number is computed. Stage 1
has all terms of its loss, LPIPS and critic. Prints one JSON line each.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu import PAPER, Stage, stage_1, stage_2  # pyright: ignore[reportImplicitRelativeImport]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SampleSpec, SamplingConfig
from bld_core.prior.binary import BinaryModel
from bld_core.training.loop import Batch, train


class Launches(TorchDispatchMode):
    """Counts the operations under it that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def of_step(stage: Stage) -> int:
    """Of the second step: the first makes the optimizer's moments."""
    config = replace(stage.config, channels_last=False)  # fake tensors keep the layout that they have
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, objective = stage.make(config, "cpu")
        data = stage.data()
        count = len(data)
        batch = Batch(data, torch.full((count,), -1), torch.arange(count), [""] * count)
        next(train(state, itertools.repeat(batch), objective, config))
        with Launches() as launches:
            next(train(state, itertools.repeat(batch), objective, config))
    return launches.count


def of_reverse_step() -> int:
    """What one more step of the grid takes, at batch 1."""
    h, w, c = PAPER.code_shape
    model = BinaryModel(PAPER.prior, DiffusionConfig(), h * w, c)
    T = model.process.schedule.steps
    grids = [SamplingConfig(grid=grid) for grid in ([T, T // 2, 0], [T, T // 2, T // 4, 0])]
    assert model.process.schedule.levels, "numbers, which fake tensors have not, are looked at before there are any"
    counts: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = model.network().eval()
        for config in grids:
            with Launches() as launches:
                model.sample(network, SampleSpec(torch.arange(1)), config)
            counts.append(launches.count)
    return counts[1] - counts[0]


COUNTED: dict[str, Callable[[], int]] = {
    "stage 1": lambda: of_step(stage_1(PAPER)),
    "stage 2": lambda: of_step(stage_2(PAPER)),
    "reverse step": of_reverse_step,
}

if __name__ == "__main__":
    for name, count in COUNTED.items():
        print(json.dumps({"name": f"launches {name}", "value": count(), "unit": "operations"}), flush=True)
