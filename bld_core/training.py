"""The training loop, for both stages: a generator that yields one report per step. No callbacks, no Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bld_core.ema import Ema


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training stage.

    Args:
        steps: optimizer steps in all.
        batch_size: samples a step, over all workers together.
        learning_rate: step size of AdamW, reached after the warm-up.
        warmup: steps of linear warm-up.
        decay: "constant" after the warm-up, or "cosine" to 0 at the last step.
        betas: decay of AdamW's two moments.
        weight_decay: decoupled weight decay of AdamW.
        clip_norm: largest gradient norm; a larger one is scaled down to it.
        ema_decay: decay a step of the averaged weights, which are the ones evaluated and kept.
        log_every: steps between two reports.
        evaluate_every: steps between two evaluations on held-out data, with pictures; the last step always has one.
        checkpoint_every: steps between two checkpoints; the last step always has one.
    """

    steps: int = 100_000
    batch_size: int = 256
    learning_rate: float = 2e-4
    warmup: int = 1000
    decay: Literal["constant", "cosine"] = "constant"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    log_every: int = 50
    evaluate_every: int = 5000
    checkpoint_every: int = 5000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a training stage is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of a training stage is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay of a training stage is {self.ema_decay}; it must lie in [0, 1)")


class Batch(NamedTuple):
    """One worker's share of a global batch.

    data: uint8 images (B, H, W, channels), or codes 0/1 (B, N, C).
    labels: int64 (B,); -1 is none.
    sample_index: int64 (B,): global index, step * global batch size + position: what all noise is keyed on.
    """

    data: Tensor
    labels: Tensor
    sample_index: Tensor


Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        module: the network.
        replica: what is called in the forward pass: the network itself, or its DistributedDataParallel.
        optimizer: over the network's parameters.
        ema: averaged weights.
        step: optimizer steps taken.
    """

    module: nn.Module
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    step: int = 0


class Report(NamedTuple):
    """What one step has to say: `terms` are this worker's losses, scalars, detached; "loss" is their sum."""

    step: int
    learning_rate: float
    gradient_norm: Tensor
    terms: dict[str, Tensor]


def make_state(module: nn.Module, config: TrainingConfig, replica: nn.Module | None = None) -> TrainState:
    """A fresh state around a network; `replica` is its DistributedDataParallel, if there is one."""
    first, second = config.betas
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=(first, second),
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainState(module, module if replica is None else replica, optimizer, Ema(module, config.ema_decay))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the step after `step` steps: linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.decay == "constant":
        return config.learning_rate * warm
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    state: TrainState, batches: Iterator[Batch], objective: Objective, config: TrainingConfig
) -> Iterator[Report]:
    """Take steps until `config.steps`; yields after each, when `state` is whole and may be saved or evaluated.

    Args:
        state: changed in place.
        batches: must start with the batch that follows `state.step`.
        objective: (network, batch) -> {"loss": ..., and its terms}.
        config: of the stage.
    """
    parameters = list(state.module.parameters())
    while state.step < config.steps:
        batch = next(batches)
        rate = learning_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        terms = objective(state.replica, batch)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        state.optimizer.step()
        state.step += 1
        state.ema.update(state.module, state.step)
        yield Report(state.step, rate, norm, {name: value.detach() for name, value in terms.items()})


def worker_share(config: TrainingConfig, world: int) -> int:
    """Samples of a global batch for each of `world` workers.

    Raises:
        ValueError: the batch does not divide.
    """
    if config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {world} workers; make it a multiple of {world}"
        )
    return config.batch_size // world
