"""One command for the first minutes with a GPU: are its results right, and how fast is everything that runs there?

    python benchmarks/gpu.py [--minutes 8] [--images 4] [--codes 32]
    python benchmarks/gpu.py --small  # the same code at sizes for a CPU, in seconds

Needs bld_core with what it imports (torch, safetensors, Pillow, fsspec, braceexpand, tenacity) and torchvision; no Ray,
no data, no weights: networks are untrained, which changes no time, and images and codes are noise.

First small networks, on this device beside the CPU: noise and packed bits must be the same bit for bit, and so must
what is drawn twice; losses of both stages in each precision, plain and compiled, bits of an encoder and samples must be
so to a bound, the `peer` of such a line. Then the paper's networks at 256 x 256: a training step of both stages
(the second part of stage 1, with LPIPS and critic) of as many images and codes as a GPU of its configuration has,
encoding, and sampling; each plain and compiled. The `peer` of a line is what the matrix rate of the same type, measured
beside it, would allow, and `ratio` the share of it that is reached; of a sampling line it is the bare passes. Beside it
stand seconds of the first step, compilation included, bytes at the peak and waits for the GPU.

Prints one JSON line each. What fails, or is not begun before the time is over, has its "error" in its place; the rest
goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from sampler import measure, stirred, untrained  # pyright: ignore[reportImplicitRelativeImport]
from timing import matrix_rate, seconds  # pyright: ignore[reportImplicitRelativeImport]
from torch import Tensor

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.autoencoder.perceptual import Perceptual
from bld_core.autoencoder.quantizer import quantize
from bld_core.data.tensors import to_float
from bld_core.diffusion.process import DiffusionConfig
from bld_core.generator import Generator
from bld_core.latents.bits import pack_bits, unpack_bits
from bld_core.noise import uniform
from bld_core.precision import Precision, TrainingPrecision, autocast, ieee_float32, training_arithmetic
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.training.cost import Step, pass_cost, step_cost
from bld_core.training.inference import Network, for_inference
from bld_core.training.loop import Batch, Objective, TrainingConfig, TrainState, make_state, train

_NEVER = 10**9
_DTYPE: dict[TrainingPrecision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
}
_INFERENCE: tuple[Precision, ...] = ("float32", "bfloat16")
_BOUNDS: dict[TrainingPrecision, float] = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 5e-2}  # of losses, relative
_WARMING = 3  # steps before those that count: the optimizer makes its moments, the allocator its pool

Line = dict[str, Any]


class Sizes(NamedTuple):
    """What is run.

    Attributes:
        autoencoder: the networks of stage 1.
        prior: the network of stage 2.
        image_size: pixels.
        images: of a step of stage 1.
        codes: of a step of stage 2.
        encoded: images of a pass of the encoder.
        loss: of stage 1.
        reverse_steps: of the samples.
        repeats: steps or passes that are timed.
    """

    autoencoder: AutoencoderConfig
    prior: PriorConfig
    image_size: int
    images: int
    codes: int
    encoded: int
    loss: LossConfig
    reverse_steps: Sequence[int]
    repeats: int

    @property
    def code_shape(self) -> tuple[int, int, int]:
        return self.autoencoder.code_shape(self.image_size)


PAPER = Sizes(
    AutoencoderConfig(),
    PriorConfig(trunk=[]),
    *(256, 4, 32, 64),
    LossConfig(perceptual=1.0, adversarial=1.0, adversarial_limit=1.0),
    *((16, 64), 20),
)
SMALL = Sizes(
    AutoencoderConfig(bits=8, channels=8, multipliers=[1, 1], blocks=1, attention=[2]),
    PriorConfig(layers=2, width=32, heads=2, trunk=[]),
    *(16, 2, 4, 4),
    LossConfig(perceptual=1.0, adversarial=1.0, critic_channels=4, critic_layers=1),
    *((2, 3), 2),
)


class Stage(NamedTuple):
    """A stage of training: its state and objective on a device, a batch of data, and how it is trained."""

    make: Callable[[TrainingConfig, str], tuple[TrainState, Objective]]
    data: Callable[[], Tensor]
    config: TrainingConfig


def on(device: str, network: Network) -> Network:
    """A network on a device; the fake tensors of a count cannot be moved, not even to where they are."""
    return network if device == "cpu" else network.to(device)


def stage_1(sizes: Sizes) -> Stage:
    def make(config: TrainingConfig, device: str) -> tuple[TrainState, Objective]:
        state = make_state(on(device, make_autoencoder(sizes.autoencoder, 3)), config)
        state.critic = make_state(on(device, PatchCritic(sizes.loss, 3)), config)
        perceptual = on(device, Perceptual.without_weights())
        return state, AutoencoderObjective(sizes.loss, sizes.code_shape, 0, perceptual)

    shape = (sizes.images, sizes.image_size, sizes.image_size, 3)
    config = _config(sizes.images, channels_last=True)
    return Stage(make, lambda: torch.randint(0, 256, shape).byte(), config)


def stage_2(sizes: Sizes) -> Stage:
    h, w, c = sizes.code_shape
    model = make_model(sizes.prior, DiffusionConfig(), h * w, c)
    objective = model.objective(0)  # looks at its schedule's numbers, which the fake tensors of a count have not

    def make(config: TrainingConfig, device: str) -> tuple[TrainState, Objective]:
        return make_state(on(device, stirred(model.network())), config), objective

    return Stage(make, lambda: torch.randint(0, 2, (sizes.codes, h * w, c)).byte(), _config(sizes.codes))


def _config(batch_size: int, **settings: Any) -> TrainingConfig:
    """Nobody looks at a step, so that the host never has to wait for one."""
    never = {"log_every": _NEVER, "evaluate_every": _NEVER, "checkpoint_every": _NEVER}
    return TrainingConfig(steps=_NEVER, batch_size=batch_size, warmup=0, **never, **settings)


def steps_of(stage: Stage, config: TrainingConfig, device: str) -> Iterator[Tensor]:
    """The losses of a training of seeded weights on one batch of noise, over and over."""
    torch.manual_seed(0)
    data = stage.data().to(device)
    state, objective = stage.make(config, device)
    count = len(data)
    places, labels = torch.arange(count, device=device), torch.full((count,), -1, device=device)
    batches = (Batch(data, labels, step * count + places, [""] * count) for step in itertools.count())
    for report in train(state, batches, objective, config):
        yield report.terms["loss"]


# --- Are its results right? -------------------------------------------------------------------------------------------


def within(bound: float, difference: float, unit: str) -> Line:
    """The line of a difference that may be as large as a bound; 0 asks for the same bits."""
    assert difference <= bound, f"{difference:.3g} {unit}, of which {bound:.3g} are allowed"
    return {"value": difference, "unit": unit, "peer": bound, "ratio": difference / bound if bound else 0.0}


def same_noise(device: str) -> Line:
    """Uniform numbers, and bits packed and unpacked: exact."""
    index = torch.arange(100) * 10**12
    numbers = uniform(3, "gpu", index, 1000)
    there = uniform(3, "gpu", index.to(device), 1000)
    bits = (there < 0.5).byte()
    packed = pack_bits(bits)
    same = torch.equal(unpack_bits(packed, (1000,)), bits) and torch.equal(packed.cpu(), pack_bits(bits.cpu()))
    return within(0.0, float((numbers != there.cpu()).sum()) + (not same), "numbers that differ")


def losses(stage: Stage, device: str, **how: Any) -> Tensor:
    """Of three steps."""
    return torch.stack([*itertools.islice(steps_of(stage, replace(stage.config, **how), device), 3)]).cpu()


def same_losses(stage: Stage, expected: Callable[[], Tensor], bound: float, device: str, **how: Any) -> Line:
    """Beside those of plain float32 on the CPU, relative to them."""
    ours = losses(stage, device, **how)
    return within(bound, float(((ours - expected()) / expected()).abs().max()), "relative difference of losses")


def skipped_step(stage: Stage, device: str) -> Line:
    """A step whose loss is not finite leaves weights, moments and averages as they were: exact."""
    torch.manual_seed(0)
    config = replace(stage.config, non_finite="skip")
    state, objective = stage.make(config, device)
    data = stage.data().to(device)
    batch = Batch(
        data, torch.full((len(data),), -1, device=device), torch.arange(len(data), device=device), [""] * len(data)
    )

    def poisoned(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        terms = objective(state, batch)
        return terms | {"loss": terms["loss"] * (1.0 if state.step == 0 else torch.nan)}

    loop = train(state, itertools.repeat(batch), poisoned, config)
    next(loop)
    before = {name: weights.clone() for name, weights in state.module.state_dict().items()}
    next(loop)
    after = state.module.state_dict()
    return within(0.0, float(sum(not torch.equal(after[name], before[name]) for name in before)), "weights that moved")


@torch.no_grad()
def same_bits(sizes: Sizes, device: str) -> Line:
    """The modes of an encoder in float32, beside those on the CPU."""
    torch.manual_seed(0)
    network = make_autoencoder(sizes.autoencoder, 3).eval()
    x = to_float(torch.randint(0, 256, (8, sizes.image_size, sizes.image_size, 3)).byte())
    with ieee_float32():
        expected = quantize(network.encode(x))
        ours = quantize(network.to(device).encode(x.to(device))).cpu()
    return within(1e-3, float((ours != expected).float().mean()), "share of bits that differ")


def same_samples(sizes: Sizes, precision: Precision, *, compiled: bool, device: str) -> Line:
    """Images drawn twice are the same bytes; beside the CPU's in float32, few differ by more than two grey levels."""
    settings: dict[str, Any] = {"precision": precision, "compile": compiled, "steps": max(sizes.reverse_steps)}
    here, there = (untrained(sizes.autoencoder, sizes.prior, sizes.image_size, place) for place in ("cpu", device))
    ours = [there.sample(6, batch_size=4, **settings) for _ in range(2)]
    assert torch.equal(*ours), "the second time other images were drawn"
    expected = here.sample(6, batch_size=4, steps=settings["steps"])
    bound = 0.01 if precision == "float32" else 0.25  # a bit that falls the other way changes those around it
    return within(
        bound, float(((ours[0].int() - expected.int()).abs() > 2).float().mean()), "share of values that differ"
    )


def said(precision: TrainingPrecision, compiled: bool) -> str:
    return f"{precision} compiled" if compiled else precision


def checks(device: str) -> Iterator[tuple[str, Callable[[], Line]]]:
    yield "noise and packed bits", partial(same_noise, device)
    for name, stage in (("stage 1", stage_1(SMALL)), ("stage 2", stage_2(SMALL))):
        expected = cache(partial(losses, stage, "cpu"))
        plain, fast = itertools.product(_BOUNDS, (False,)), itertools.product(_INFERENCE, (True,))
        for precision, compiled in itertools.chain[tuple[TrainingPrecision, bool]](plain, fast):
            same = partial(same_losses, stage, expected, _BOUNDS[precision], device)
            yield f"losses of {name}, {said(precision, compiled)}", partial(same, precision=precision, compile=compiled)
        yield f"skipped step of {name}", partial(skipped_step, stage, device)
    yield "bits of an encoder", partial(same_bits, SMALL, device)
    for precision, compiled in itertools.product(_INFERENCE, (False, True)):
        how = said(precision, compiled)
        yield f"samples, {how}", partial(same_samples, SMALL, precision, compiled=compiled, device=device)


# --- How fast is it? --------------------------------------------------------------------------------------------------


@cache
def rate(precision: TrainingPrecision, device: str) -> float:
    """Operations a second of a large matrix product, two a multiply-add."""
    with training_arithmetic(precision):
        return 2e9 * matrix_rate(_DTYPE[precision], device)


def rate_line(precision: TrainingPrecision, device: str) -> Line:
    return {"value": rate(precision, device) / 1e12, "unit": "TFLOP/s"}


def peak(device: str) -> int | None:
    """Bytes of the GPU at the most since it was last asked for."""
    if device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def waits(work: Callable[[], object], device: str) -> int | None:
    """How often the host waits for the GPU in some work, as far as PyTorch sees it."""
    if device != "cuda":
        work()
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def speed(unit: str, count: int, operations: float, precision: TrainingPrecision, device: str, taken: float) -> Line:
    """The line of some work on `count` images or codes that takes so many operations, and took so many seconds."""
    limit = rate(precision, device) / operations
    return {"value": count / taken, "unit": unit, "peer": count * limit, "ratio": 1 / taken / limit}


def operations_of(stage: Stage) -> int:
    """Of a step, counted."""
    plain = replace(stage.config, channels_last=False)
    return step_cost(Step(lambda: stage.make(plain, "cpu"), stage.data, plain)).operations


def training(
    stage: Stage, operations: Callable[[], int], precision: TrainingPrecision, repeats: int, device: str, **how: bool
) -> Line:
    """Steps of a stage: the median, after some that are not counted."""
    loop = steps_of(stage, replace(stage.config, precision=precision, **how), device)
    first = seconds(lambda: next(loop), device)
    for _ in range(_WARMING):
        next(loop)
    peak(device)
    taken = statistics.median([seconds(lambda: next(loop), device) for _ in range(repeats)])
    waited = waits(lambda: [next(loop) for _ in range(repeats)], device)
    line = speed("images/s", stage.config.batch_size, operations(), precision, device, taken)
    a_step = None if waited is None else waited / repeats
    return line | {"seconds_a_step": taken, "first_step": first, "bytes": peak(device), "waits_a_step": a_step}


@torch.no_grad()
def encoding(sizes: Sizes, precision: Precision, device: str, *, compiled: bool) -> Line:
    """Passes of the encoder, from uint8 images on the device to their likeliest bits, packed."""
    with torch.device("meta"):
        counted = make_autoencoder(sizes.autoencoder, 3)
        x = torch.zeros(1, 3, sizes.image_size, sizes.image_size)
    _, operations = pass_cost(counted.encoder, lambda: counted.encode(x))
    network = make_autoencoder(sizes.autoencoder, 3).to(device).eval()
    network.encoder = for_inference(network.encoder, precision, compiled=compiled)
    images = torch.randint(0, 256, (sizes.encoded, sizes.image_size, sizes.image_size, 3)).byte().to(device)

    def encode() -> None:
        with ieee_float32(), autocast(precision, torch.device(device)):
            pack_bits(quantize(network.encode(to_float(images))))

    first = seconds(encode, device)
    encode()
    peak(device)
    taken = statistics.median([seconds(encode, device) for _ in range(sizes.repeats)])
    line = speed("images/s", sizes.encoded, sizes.encoded * operations, precision, device, taken)
    return line | {"first_pass": first, "bytes": peak(device), "waits_a_pass": waits(encode, device)}


def sampling(generator: Callable[[], Generator], settings: dict[str, Any], steps: int, batch: int) -> Line:
    """Images drawn; see sampler.py."""
    drawing = generator()
    device = drawing.device.type

    def draw() -> None:
        drawing.sample(batch, steps=steps, batch_size=batch, **settings)

    first = seconds(draw, device)
    peak(device)
    line = measure(drawing, settings, steps, batch, repeats=3)
    return line | {"first_draw": first, "bytes": peak(device), "waits_a_draw": waits(draw, device)}


def measurements(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], Line]]]:
    """What takes least comes first, as time may run out."""
    for precision in _DTYPE:
        yield f"matrix rate {precision}", partial(rate_line, precision, device)
    stages = {"stage 1": stage_1(sizes), "stage 2": stage_2(sizes)}
    counts = {name: cache(partial(operations_of, stage)) for name, stage in stages.items()}
    generator = cache(lambda: untrained(sizes.autoencoder, sizes.prior, sizes.image_size, device))
    for compiled in (False, True):
        for name in ("stage 2", "stage 1"):
            steps = partial(training, stages[name], counts[name], "bfloat16", sizes.repeats, device)
            yield f"{name} {said('bfloat16', compiled)}", partial(steps, compile=compiled)
        for precision in _INFERENCE:
            yield f"encode {said(precision, compiled)}", partial(encoding, sizes, precision, device, compiled=compiled)
        for precision, batch in (("bfloat16", 1), ("float32", 1), ("bfloat16", sizes.encoded)):
            settings = {"precision": precision, "compile": compiled}
            for count in sizes.reverse_steps:
                name = f"sample {precision}{' compiled' if compiled else ''}, {count} steps, batch {batch}"
                yield name, partial(sampling, generator, settings, count, batch)


def attempt(work: Callable[[], Line], *, over: bool) -> Line:
    """What some work has to say, or why it has nothing."""
    if over:
        return {"error": "not begun: the time is over"}
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--images", type=int, default=PAPER.images)
    parser.add_argument("--codes", type=int, default=PAPER.codes)
    flags = parser.parse_args()
    end = time.monotonic() + 60 * flags.minutes
    sizes = SMALL if flags.small else PAPER._replace(images=flags.images, codes=flags.codes)
    machine = torch.cuda.get_device_name() if flags.device == "cuda" else "cpu"
    print(json.dumps({"name": "machine", "device": machine, "torch": torch.__version__}), flush=True)
    failed = False
    for name, work in itertools.chain(checks(flags.device), measurements(sizes, flags.device)):
        line = attempt(work, over=time.monotonic() > end)
        failed |= "error" in line
        print(json.dumps({"name": name} | line), flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
