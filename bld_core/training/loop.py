"""The training loop, for both stages: a generator that yields one report per step. No callbacks, no Ray."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from bld_core.errors import NonFiniteError, UserError
from bld_core.precision import TrainingPrecision, autocast, training_arithmetic
from bld_core.training.averages import LONGEST, SNAPSHOT_LENGTHS, Ema, PowerEma
from bld_core.training.gate import Later, step_unless
from bld_core.training.layers import Layers, compile_layers
from bld_core.training.muon import Muon
from bld_core.training.replicas import ReducePrecision, gradients_laid_out_as_weights, reduce_gradients_in
from bld_core.training.sharding import whole

_SNAPSHOTS = 16
_TRAPEZOID_END = 0.2  # of the steps after the warm-up
_WIDTH = 128  # where a rate of Muon means what it means for AdamW
_MUON_RATE = 0.2 * math.sqrt(_WIDTH)  # makes steps about as long as AdamW's there (Liu et al. 2025)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training stage.

    Args:
        steps: optimizer steps in all.
        batch_size: samples a step, over all workers together.
        accumulate: passes that a worker's share of the batch is split into, one after the other, to save memory.
        optimizer: "adamw", or "muon": orthogonalised momentum (Jordan et al. 2024) for the matrices of a transformer's
            blocks, and AdamW for all other weights. With it one rate serves networks of any width: a step changes what
            each matrix gives by as much (Yang et al. 2022), and at width 128 it is about as long as AdamW's.
        learning_rate: step size, reached after the warm-up.
        warmup: steps of linear warm-up.
        decay: "constant" after the warm-up, "linear" or "cosine" to 0 at the last step, or "trapezoid": constant, and
            linear to 0 in the last fifth, so that a run can be continued from before it.
        betas: decay of AdamW's two moments, two values in [0, 1).
        weight_decay: decoupled weight decay of AdamW; 0 makes it Adam.
        clip_norm: largest gradient norm; a larger one is scaled down to it.
        ema_decay: decay a step of the averaged weights, which are the ones evaluated and kept. Of several decays the
            average with the best likelihood bound on held-out codes is kept (stage 2), or the first (stage 1).
        ema_lengths: relative lengths of more averages to choose from, each a share of the training in (0, 0.28), made
            after the last step from 16 snapshots (Karras et al. 2024), for stage 2; empty takes no snapshots. Each
            snapshot has the size of the weights, twice.
        non_finite: what a loss or gradient that is not finite does: "stop" with the samples to blame, or "skip" the
            step and count it.
        precision: of products and convolutions; weights, sums and losses are float32 in any case. "tf32" is faster
            than "float32" on a GPU, and the same on a CPU; "bfloat16" is faster still.
        reduce_precision: of gradients on their way between workers. "bfloat16" halves what they send, and keeps 8 bits
            of each worker's part and of every sum of them, so that rounding grows with the workers; one sends nothing.
        fsdp: share out weights, gradients, moments and averages over the workers, each of which otherwise has them all
            (fully sharded data parallelism), for networks that do not fit; stage 2 alone. Checkpoints are the same. It
            wants `checkpointing`, without which bfloat16 copies of weights stay until the backward pass.
        compile: compile the blocks of the network with torch.compile; the first step takes minutes, the others less.
        channels_last: keep feature maps with their channels innermost, which convolutions like.
        checkpointing: recompute activations in the backward pass, which saves memory and costs a third of the speed.
        log_every: steps between two reports.
        evaluate_every: steps between two evaluations on held-out data, with pictures; the last step always has one.
        checkpoint_every: steps between two checkpoints; the last step always has one.
    """

    steps: int = 100_000
    batch_size: int = 256
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-4
    warmup: int = 1000
    decay: Literal["constant", "linear", "cosine", "trapezoid"] = "constant"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float | list[float] = 0.9999
    ema_lengths: list[float] = field(default_factory=list)
    non_finite: Literal["stop", "skip"] = "stop"
    precision: TrainingPrecision = "float32"
    reduce_precision: ReducePrecision = "float32"
    fsdp: bool = False
    compile: bool = False
    channels_last: bool = False
    checkpointing: bool = False
    log_every: int = 50
    evaluate_every: int = 5000
    checkpoint_every: int = 5000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1", self)
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be above 0", self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"`betas` are {self.betas}; AdamW takes two values in [0, 1)", self)
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise UserError(f"`ema_decay` is {self.ema_decay}; it must lie in [0, 1), or be several such values", self)
        if not all(0 < length < LONGEST for length in self.ema_lengths):
            raise UserError(f"`ema_lengths` is {self.ema_lengths}; each must lie in (0, {LONGEST:.4f})", self)

    @property
    def snapshot_every(self) -> int:
        """Steps between two snapshots, of which the last step also has one."""
        return -(-self.steps // _SNAPSHOTS)

    @property
    def looks(self) -> list[int]:
        """How many steps lie between two looks of the caller at a report or the state, by what it looks for."""
        snapshots = [self.snapshot_every] if self.ema_lengths else []
        return [self.log_every, self.evaluate_every, self.checkpoint_every, *snapshots]

    @property
    def ema_decays(self) -> list[float]:
        """The decay of each average of the weights."""
        return self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]


class Batch(NamedTuple):
    """One worker's share of a global batch.

    data: uint8 images (B, H, W, channels), or codes 0/1 (B, N, C).
    labels: int64 (B,); -1 is none.
    sample_index: int64 (B,): global index, step * global batch size + position: what all noise is keyed on.
    keys: the samples' names in their shards.
    """

    data: Tensor
    labels: Tensor
    sample_index: Tensor
    keys: Sequence[str]

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` equal parts, in order."""
        size = len(self.keys) // count
        return [self.slice(start, start + size) for start in range(0, size * count, size)]

    def slice(self, start: int, stop: int) -> Batch:
        """The samples `start` to `stop` (exclusive)."""
        rows = slice(start, stop)
        return Batch(self.data[rows], self.labels[rows], self.sample_index[rows], self.keys[rows])

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        data, labels, index = (to_device(x, device) for x in self[:3])
        return Batch(data, labels, index, self.keys)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host does not wait until it is there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


@dataclass
class TrainState:
    """Everything that training changes. Called as a function, it is the network's forward pass in training.

    Attributes:
        module: the network.
        replica: what is called in the forward pass: the network itself, its weights perhaps shared out over the
            replicas, or its DistributedDataParallel.
        optimizers: each over some of the network's parameters, all of them together.
        averages: averaged weights, one for each decay; then those that averages of other lengths are made of.
        step: optimizer steps taken.
        skipped: steps left out because the loss or a gradient was not finite.
        precision: of products and convolutions; weights and losses are float32.
        critic: the discriminator that stage 1 is trained against, a state of its own.
    """

    module: nn.Module
    replica: nn.Module
    optimizers: list[torch.optim.Optimizer]
    averages: list[Ema]
    step: int = 0
    skipped: int = 0
    precision: TrainingPrecision = "float32"
    critic: TrainState | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass, under autocast where the precision asks for it."""
        with self._autocast():
            return self.replica(*inputs)

    def with_constant_weights(self, *inputs: Any) -> Any:
        """The forward pass with constant weights: gradients reach the inputs alone, and replicas do not meet."""
        constants = {name: weight.detach() for name, weight in self.module.named_parameters()}
        with self._autocast():
            return functional_call(self.module, constants, inputs)

    def _autocast(self) -> torch.autocast:
        return autocast(self.precision, next(self.module.parameters()).device)

    def states(self) -> list[TrainState]:
        """The state, and its critic's where it has one."""
        return [self] if self.critic is None else [self, self.critic]


Objective = Callable[[TrainState, Batch], dict[str, Tensor]]


class Report(NamedTuple):
    """What one step has to say: `terms` are this worker's losses, scalars, detached."""

    step: int
    learning_rate: float
    gradient_norm: Tensor
    terms: dict[str, Tensor]


def make_state(
    module: nn.Module, config: TrainingConfig, wrap: Callable[[nn.Module], nn.Module] = lambda module: module
) -> TrainState:
    """A fresh state around a network.

    Args:
        module: changed in place by `checkpointing`, `channels_last` and `compile`.
        config: of the stage.
        wrap: makes the replica, for example moves the network to a GPU and into its DistributedDataParallel.
    """
    for part in module.modules():
        if isinstance(part, Layers):
            part.checkpointing = config.checkpointing
    if config.channels_last:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch types leave it out
    gradients_laid_out_as_weights(module)
    if config.compile:
        compile_layers(module)
    replica = reduce_gradients_in(wrap(module), config.reduce_precision)
    averages = [Ema(module, decay) for decay in config.ema_decays]
    if config.ema_lengths:
        averages += [PowerEma(module, length) for length in SNAPSHOT_LENGTHS]
    optimizers = _optimizers(module, config)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return TrainState(module, replica, optimizers, averages, precision=config.precision)


def _optimizers(module: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    rate, decay, (first, second) = config.learning_rate, config.weight_decay, config.betas
    adamw = partial(torch.optim.AdamW, lr=rate, betas=(first, second), weight_decay=decay, fused=True)
    if config.optimizer == "adamw":
        return [adamw(module.parameters())]
    blocks = [part for part in module.modules() if isinstance(part, Layers)]
    matrices = [weight for part in blocks for weight in part.parameters() if weight.ndim == 2]
    if not matrices:
        raise UserError(
            "`optimizer` is muon, which is for the matrices of a transformer's blocks, and this network has none: "
            "set it to adamw",
            config,
        )
    muon = Muon(matrices, lr=_MUON_RATE * rate, weight_decay=decay / _MUON_RATE)
    chosen = {*matrices}
    inputs = {part.weight: part.in_features for part in module.modules() if isinstance(part, nn.Linear)}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for weight in module.parameters():
        if weight not in chosen:  # what sums over more features than _WIDTH moves the less
            by_rate.setdefault(rate * min(1.0, _WIDTH / inputs.get(weight, 1)), []).append(weight)
    return [muon, adamw([{"params": weights, "lr": lr} for lr, weights in by_rate.items()])]


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the step after `step` steps: linear warm-up, then as `config.decay` says."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    match config.decay:
        case "constant":
            height = 1.0
        case "linear":
            height = 1 - progress
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * progress))
        case "trapezoid":
            height = min(1.0, (1 - progress) / _TRAPEZOID_END)
    return config.learning_rate * warm * height


def train(
    state: TrainState, batches: Iterator[Batch], objective: Objective, config: TrainingConfig
) -> Iterator[Report]:
    """Take steps until `config.steps`; yields after each, when `state` is whole and may be saved or evaluated.

    Args:
        state: changed in place.
        batches: must start with the batch that follows `state.step`.
        objective: (state, batch) -> {"loss": ..., its terms, and "critic": the critic's own loss where there is one}.
        config: of the stage.

    A step does nothing where its loss or a gradient is not finite, as the device sees for itself. The host hears of it
    a step later, so that it never waits; or at once where the caller is to look: see `TrainingConfig.looks`.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on some replica, and `config.non_finite` is "stop";
            names the step, the terms and the samples. No weight has been touched by it.
    """
    taken: _Taken | None = None
    while state.step < config.steps:
        batch = next(batches)
        rate = learning_rate(config, state.step)
        for each in state.states():
            for group in (group for optimizer in each.optimizers for group in optimizer.param_groups):
                # A critic's rate follows the warm-up and the decay of the stage.
                group["lr"] = group["initial_lr"] * (rate / config.learning_rate)
        terms = _gradients(state, batch, objective, config.accumulate)
        moved = [each for each in state.states() if any(p.grad is not None for p in each.module.parameters())]
        norms = [whole(nn.utils.clip_grad_norm_(each.module.parameters(), config.clip_norm)) for each in moved]
        bad = (~torch.stack(norms).isfinite()).any().float()  # the same on all replicas, as their gradients are
        if taken is not None:  # this step is under way meanwhile
            _settle(state, taken, objective, config)
        for optimizer in (optimizer for each in moved for optimizer in each.optimizers):
            step_unless(bad, optimizer)
        for each in moved:
            each.step += 1
            for average in each.averages:
                average.update(each.module, each.step)
        taken = _Taken(state.step, batch, terms, Later(bad))
        if state.step == config.steps or any(state.step % every == 0 for every in config.looks):
            _settle(state, taken, objective, config)
            taken = None
        yield Report(state.step, rate, norms[0], terms)


def _gradients(state: TrainState, batch: Batch, objective: Objective, parts: int) -> dict[str, Tensor]:
    """Leave the batch's gradients in the parameters; returns the terms.

    Replicas meet once, in the last part; or in each, where they share out the weights.
    """
    for each in state.states():
        each.module.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(batch.parts(parts), 1):
        with training_arithmetic(state.precision), contextlib.ExitStack() as alone:
            for each in state.states():
                if number < parts and isinstance(each.replica, DistributedDataParallel):
                    alone.enter_context(each.replica.no_sync())
            terms = objective(state, part)
            loss = terms["loss"] + terms["critic"] if "critic" in terms else terms["loss"]
            # One that is not finite makes its gradients so, and with them those of all replicas.
            loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan) / parts)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / parts
    return sums


class _Taken(NamedTuple):
    """A step that was taken, unless `bad`: what there is to say of it then."""

    step: int
    batch: Batch
    terms: dict[str, Tensor]
    bad: Later


def _settle(state: TrainState, taken: _Taken, objective: Objective, config: TrainingConfig) -> None:
    """Hear whether a step was good, and stop or count it where it was not."""
    if not taken.bad.read():
        return
    if config.non_finite == "stop":
        raise NonFiniteError(_blame(state, taken, objective), config)
    state.skipped += 1


@torch.no_grad()
def _blame(state: TrainState, taken: _Taken, objective: Objective) -> str:
    """Which terms of a step are not finite, and which samples of the batch by themselves, and in which term."""
    alone = replace(state, replica=state.module, critic=None)
    state.module.eval()  # nothing learns from these passes; where weights are shared out, all replicas make as many
    found = [f"batch: {wrong}"] if (wrong := _not_finite(taken.terms)) else []
    with torch.compiler.set_stance("force_eager"):  # a batch of one would be compiled anew
        for i, key in enumerate(taken.batch.keys):
            if wrong := _not_finite(objective(alone, taken.batch.slice(i, i + 1))):
                found.append(f"sample {key!r}: {wrong}")
    state.module.train()
    who = "; ".join(found) or "every term and every sample of this worker is finite by itself"
    return (
        f"step {taken.step}: the loss or its gradient is not finite ({who}): what was saved before, if "
        'anything, is good; go on with `non_finite` "skip", or train anew without these samples, or with a lower '
        "`learning_rate`"
    )


def _not_finite(terms: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite())


def worker_share(config: TrainingConfig, world: int) -> int:
    """Samples of a global batch for each of `world` workers.

    Raises:
        UserError: the batch does not divide.
    """
    parts = world * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"`batch_size` is {config.batch_size}, which does not divide over {world} workers with `accumulate` "
            f"{config.accumulate}; make it a multiple of {parts}",
            config,
        )
    return config.batch_size // world
