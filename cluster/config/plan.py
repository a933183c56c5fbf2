"""What an experiment takes of given GPUs: work, memory, time, cores that decode, storage. Nothing of it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.efficientnet_lite0 import EfficientNetLite0
from bld_core.autoencoder.feature_distance import FeatureDistance
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.autoencoder.perceptual import Perceptual
from bld_core.errors import UserError
from bld_core.prior.model import make_model
from bld_core.prior.transformer import Prior
from bld_core.training.cost import Memory, Step, pass_cost, step_cost, step_memory
from bld_core.training.loop import Objective, TrainingConfig, TrainState, make_state
from cluster.config.experiment import Experiment
from cluster.console import aligned


class Gpu(NamedTuple):
    """Of a maker's data sheet: dense bfloat16 operations a second, summed in float32, and bytes of memory."""

    rate: float
    memory: float


# NVIDIA's data sheets of the SXM models of H100, H200 and A100 80 GB, of L4 and L40S (half of what is said "with
# sparsity"), and its white paper on Ada GPUs for the RTX 4090.
GPUS = {
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
    "a100": Gpu(312e12, 80e9),
    "l40s": Gpu(362e12, 48e9),
    "l4": Gpu(121e12, 24e9),
    "4090": Gpu(165e12, 24e9),
}
# Images a second that one core decodes, by the largest image size it holds for: benchmarks/RESULTS.md.
DECODED = {128: 1273, 256: 254, 1024: 155}
_REQUEST = 8 << 20  # bytes that one request of storage reads
_SHARD = 1000  # images
_ROW = 25  # bytes of a latent beside its bits
_USABLE = 0.9  # of a GPU's memory: kernels and what travels between replicas take some


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The machines that a plan is for, and what it takes for granted.

    Args:
        gpu: kind of GPU: h100, h200, a100, l40s, l4 or 4090.
        gpus: how many of them there are.
        share: of the rate on a GPU's data sheet that networks reach, in (0, 1].
        images: of the data set, to be encoded.
        image_bytes: size of an image file.
        fit: find the largest batch that a GPU holds.
    """

    gpu: str = "h100"
    gpus: int = 8
    share: float = 0.4
    images: int = 1_281_167
    image_bytes: int = 110_000
    fit: bool = False

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"gpu is {self.gpu!r}; it must be one of {', '.join(GPUS)}")
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share}; it must lie in (0, 1]")
        for name in ("gpus", "images", "image_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


class StagePlan(NamedTuple):
    """What a stage takes.

    Attributes:
        name: of the stage.
        parameters: of its networks.
        operations: floating-point operations an image or code.
        rate: images or codes a second of all GPUs.
        hours: that the stage takes.
        cores: that decode as fast.
        read: bytes of storage read, each image as often as it is used.
        requests: to storage.
        written: bytes of a checkpoint, or of the latents.
        at_once: images or codes in a pass of one GPU.
        memory: of one GPU, where the stage trains.
        largest: images or codes that a pass of one GPU can hold, where it was asked for.
    """

    name: str
    parameters: int
    operations: float
    rate: float
    hours: float
    cores: float
    read: float
    requests: int
    written: float
    at_once: int
    memory: Memory | None = None
    largest: int | None = None


def network_sizes(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Parameters of each network, and operations of its forward pass of one image or code."""
    data, (h, w, c) = experiment.data, experiment.code_shape
    with torch.device("meta"):
        autoencoder = make_autoencoder(experiment.autoencoder, data.channels)
        critic = PatchCritic(experiment.loss, data.channels)
        x, z = torch.zeros(1, data.channels, data.image_size, data.image_size), torch.zeros(1, c, h, w)
        sizes = {
            "encoder": pass_cost(autoencoder.encoder, lambda: autoencoder.encode(x)),
            "decoder": pass_cost(autoencoder.decoder, lambda: autoencoder.decode(z)),
        }
        if experiment.loss.adversarial:
            sizes["critic"] = pass_cost(critic, lambda: critic(x))
        if experiment.prior.model == "binary":
            prior = Prior(experiment.prior, h * w, c)
            tokens, time = torch.zeros(1, h * w, c), torch.zeros(1)
            labels = torch.zeros(1, dtype=torch.int64) if experiment.prior.classes else None
            sizes["prior"] = pass_cost(prior, lambda: prior(tokens, time, labels))
    return sizes


def stage_1_step(experiment: Experiment, count: int) -> Step:
    """A step of stage 1 with `count` images, all terms of its loss at work, as in its later part."""
    data, loss = experiment.data, replace(experiment.loss, adversarial_start=0, adversarial_ramp=0)
    training = _plain(experiment.autoencoder_training, count)

    def make() -> tuple[TrainState, Objective]:
        state = make_state(make_autoencoder(experiment.autoencoder, data.channels, loss.entropy), training)
        if loss.adversarial:
            state.critic = make_state(PatchCritic(loss, data.channels), training)
        perceptual = None
        if loss.perceptual:
            lpips = loss.perceptual_network == "vgg16"
            perceptual = Perceptual.without_weights() if lpips else FeatureDistance(EfficientNetLite0())
        return state, AutoencoderObjective(loss, experiment.code_shape, 0, perceptual)

    shape = (count, data.image_size, data.image_size, data.channels)
    return Step(make, lambda: torch.zeros(shape, dtype=torch.uint8), training)


def stage_2_step(experiment: Experiment, count: int) -> Step:
    """A step of stage 2 with `count` codes."""
    h, w, c = experiment.code_shape
    training = _plain(experiment.prior_training, count)
    model = make_model(experiment.prior, experiment.diffusion, h * w, c)
    objective = model.objective(0)  # checks its schedule's numbers, which fake tensors have not

    def data() -> Tensor:
        return torch.zeros(count, h * w, c, dtype=torch.uint8)

    return Step(lambda: (make_state(model.network(), training), objective), data, training)


def _plain(training: TrainingConfig, count: int) -> TrainingConfig:
    """The pass of one GPU, without what fake tensors cannot do and the count does not ask for."""
    return replace(training, batch_size=count, accumulate=1, compile=False, channels_last=False)


def make_plan(experiment: Experiment, plan: PlanConfig) -> list[StagePlan]:
    """Stage 1, the encode job and stage 2 on these GPUs."""
    encode = encode_plan(experiment, plan)
    first = _trained("stage 1", experiment.autoencoder_training, plan, lambda n: stage_1_step(experiment, n))
    second = _trained("stage 2", experiment.prior_training, plan, lambda n: stage_2_step(experiment, n))
    used = experiment.autoencoder_training.steps * experiment.autoencoder_training.batch_size
    each = int(encode.written) // plan.images
    return [
        first._replace(
            cores=first.rate / _decoded(experiment),
            read=float(used * plan.image_bytes),
            requests=_requests(used, plan.image_bytes),
        ),
        encode,
        second._replace(read=encode.written, requests=_requests(plan.images, each)),
    ]


def encode_plan(experiment: Experiment, plan: PlanConfig) -> StagePlan:
    """The encode job on these GPUs."""
    gpu, code = GPUS[plan.gpu], math.prod(experiment.code_shape) // 8 + _ROW
    parameters, operations = network_sizes(experiment)["encoder"]
    rate = plan.gpus * plan.share * gpu.rate / operations
    rows = plan.images * max(1, experiment.latents.draws) * (2 if experiment.latents.mirror else 1)
    return StagePlan(
        "encode",
        parameters,
        operations=float(operations),
        rate=rate,
        hours=plan.images / rate / 3600,
        cores=rate / _decoded(experiment),
        read=float(plan.images * plan.image_bytes),
        requests=_requests(plan.images, plan.image_bytes),
        written=float(rows * code),
        at_once=experiment.latents.batch_size,
    )


def _decoded(experiment: Experiment) -> int:
    """Images a second that one core decodes."""
    return next((rate for size, rate in DECODED.items() if experiment.data.image_size <= size), DECODED[1024])


def _requests(images: int, each: int) -> int:
    """Requests for images of `each` bytes, in whole shards."""
    return math.ceil(images / _SHARD) * math.ceil(_SHARD * each / _REQUEST)


def _trained(name: str, training: TrainingConfig, plan: PlanConfig, step: Callable[[int], Step]) -> StagePlan:
    gpu = GPUS[plan.gpu]
    at_once = math.ceil(training.batch_size / (plan.gpus * training.accumulate))
    found, shared_by = step_cost(step(at_once)), plan.gpus if training.fsdp else 1
    memory = found.memory.shared_by(shared_by)
    operations = found.operations / at_once
    rate = plan.gpus * plan.share * gpu.rate / operations
    hours = training.steps * training.batch_size / rate / 3600
    largest = None
    if plan.fit:
        double = step_memory(step(2 * at_once)).shared_by(shared_by)
        here, double = sum(memory), sum(double)  # activations grow with the batch
        each = (double - here) / at_once
        largest = max(0, math.floor(at_once + (_USABLE * gpu.memory - here) / each))
    return StagePlan(
        *(name, found.memory.gradients // 4, operations, rate, hours, 0.0, 0.0, 0, float(found.memory.saved), at_once),
        *(memory, largest),
    )


def advice(stage: StagePlan, experiment: Experiment, plan: PlanConfig) -> str:
    """What bounds a stage, and what to change."""
    memory = 0 if stage.memory is None else sum(stage.memory)
    if memory > _USABLE * GPUS[plan.gpu].memory:
        if stage.name == "stage 1":
            return "does not fit: raise autoencoder_training.accumulate, or set autoencoder_training.checkpointing true"
        fsdp = "" if experiment.prior_training.fsdp or plan.gpus == 1 else ", or prior_training.fsdp true"
        return f"does not fit: raise prior_training.accumulate, or set prior_training.checkpointing true{fsdp}"
    if stage.name == "encode":
        return (
            f"decoding, where the cluster has fewer than {stage.cores:.0f} cores for it; or else the GPUs' arithmetic"
        )
    cores = plan.gpus * experiment.cluster.decode_tasks
    if stage.cores > cores:
        return (
            f"decoding: {cores} cores decode, {stage.cores:.0f} keep up; "
            f"set cluster.decode_tasks to {math.ceil(stage.cores / plan.gpus)}"
        )
    return "the GPUs' arithmetic: more GPUs, or faster ones"


def plan_table(stages: Sequence[StagePlan], experiment: Experiment, plan: PlanConfig) -> str:
    """The plan as text, with what it takes for granted."""
    head = ["", *(stage.name for stage in stages)]
    rows: list[tuple[str, Callable[[StagePlan], str]]] = [
        ("parameters", lambda s: f"{s.parameters / 1e6:.1f}M"),
        ("GFLOP an image or code", lambda s: f"{s.operations / 1e9:,.1f}"),
        ("images or codes a second", lambda s: f"{s.rate:,.0f}"),
        ("hours", lambda s: f"{s.hours:,.2f}"),
        ("cores that decode", lambda s: f"{s.cores:,.1f}" if s.cores else "-"),
        ("GB read", lambda s: f"{s.read / 1e9:,.2f}"),
        ("requests", lambda s: f"{s.requests:,}"),
        ("GB of a checkpoint, or latents", lambda s: f"{s.written / 1e9:,.2f}"),
        ("in a pass of a GPU", lambda s: f"{s.at_once:,}"),
        ("GB of a GPU", lambda s: f"{sum(s.memory) / 1e9:.2f}" if s.memory else "-"),
    ]
    lines = [head, *([label, *map(say, stages)] for label, say in rows)]
    lines.extend(
        [f"  {part}", *(f"{getattr(s.memory, part) / 1e9:.2f}" if s.memory else "-" for s in stages)]
        for part in Memory._fields
    )
    if plan.fit:
        lines.append(["largest pass of a GPU", *("-" if s.largest is None else f"{s.largest:,}" for s in stages)])
    gpu = GPUS[plan.gpu]
    return "\n".join(
        [
            *aligned(lines),
            "",
            *(f"{stage.name} is bounded by: {advice(stage, experiment, plan)}" for stage in stages),
            "",
            f"worked out, not measured: {plan.gpus} {plan.gpu} of {gpu.rate / 1e12:.0f} TFLOP/s in bfloat16 (the "
            f"maker's figure), of which networks use {plan.share:.0%}, and {gpu.memory / 1e9:.0f} GB;",
            f"{plan.images:,} images of {plan.image_bytes:,} bytes, {_SHARD:,} a shard; a core decodes "
            f"{', '.join(f'{rate:,} images/s up to {size} pixels' for size, rate in DECODED.items())} "
            "(measured, benchmarks/RESULTS.md);",
            "memory without compiled blocks, which keep less, and without the latents of stage 2.",
        ]
    )
