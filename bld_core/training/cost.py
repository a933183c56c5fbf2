"""What a network and a training step cost, counted without their memory or their work: on fake tensors."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bld_core.training.loop import Batch, Objective, TrainingConfig, TrainState, train


class Memory(NamedTuple):
    """Bytes of one device at the peak of a training step; kernels, and what travels between replicas, add theirs.

    Attributes:
        weights: of the network, and of its critic.
        gradients: of them.
        optimizer: its moments.
        averages: of the weights.
        constants: what else lies there between two steps, such as the perceptual network.
        activations: all the rest of the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    constants: int
    activations: int

    @property
    def saved(self) -> int:
        """Bytes of a checkpoint."""
        return self.weights + self.optimizer + self.averages

    def shared_by(self, replicas: int) -> Memory:
        """Bytes of each of some replicas that share out the weights, beside the one block that is whole at a time."""
        kept = "weights", "gradients", "optimizer", "averages"
        return self._replace(**{part: -(-getattr(self, part) // replicas) for part in kept})


class StepCost(NamedTuple):
    """What a training step costs: floating-point operations of the whole batch, two a multiply-add, and memory."""

    operations: int
    memory: Memory


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._hold(x.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def free(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


class _NormsOfGpu(TorchFunctionMode):
    """Under autocast, norms take float32 and give it, as on a GPU; a CPU leaves them in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm, F.rms_norm) and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class Step(NamedTuple):
    """A training step, of which no number is computed.

    Attributes:
        make: the state and what it minimises; called under a mode in which all tensors are fake.
        data: a batch, as in `Batch`; called likewise.
        config: how it is trained.
    """

    make: Callable[[], tuple[TrainState, Objective]]
    data: Callable[[], Tensor]
    config: TrainingConfig


def step_cost(step: Step) -> StepCost:
    """Count the second step of a training: the first makes the optimizer's moments.

    Operations are counted with plain attention, memory with the fused one, as they run; neither with compiled blocks,
    which keep less.
    """
    counter = FlopCounterMode(display=False)  # takes operations apart, into more memory than they take
    with sdpa_kernel(SDPBackend.MATH):
        _second_step(step, counter)
    return StepCost(counter.get_total_flops(), step_memory(step))


def step_memory(step: Step) -> Memory:
    """The memory of `step_cost` alone, in half of its time."""
    return _second_step(step, contextlib.nullcontext())


def _second_step(step: Step, counting: contextlib.AbstractContextManager[Any]) -> Memory:
    make, data, config = step
    unseen = 10**9  # nobody looks at a step, which would read numbers that fake tensors have not
    config = replace(config, steps=unseen, log_every=unseen, evaluate_every=unseen, checkpoint_every=unseen)
    with FakeTensorMode(allow_non_fake_inputs=True), _NormsOfGpu(), _Live() as live:
        state, objective = make()
        x = data()
        count = len(x)
        batch = Batch(x, torch.zeros(count, dtype=torch.int64), torch.arange(count), [""] * count)
        next(train(state, itertools.repeat(batch), objective, config))
        gradients = _bytes(p.grad for each in state.states() for p in each.module.parameters() if p.grad is not None)
        for each in state.states():
            each.module.zero_grad(set_to_none=True)
        rest, live.peak = live.now, live.now
        with counting:
            next(train(state, itertools.repeat(batch), objective, config))
        weights = _bytes(tensor for each in state.states() for tensor in each.module.state_dict().values())
        averages = _bytes(
            tensor for each in state.states() for average in each.averages for tensor in average.weights.values()
        )
        optimizer = _bytes(
            x
            for each in state.states()
            for one in each.optimizers
            for x in tree_leaves(list(one.state.values()))
            if isinstance(x, Tensor)
        )
        constants = rest - weights - averages - optimizer
        return Memory(weights, gradients, optimizer, averages, constants, live.peak - rest - gradients)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def pass_cost(network: nn.Module, run: Callable[[], Tensor]) -> tuple[int, int]:
    """Parameters of a network on the meta device, and the operations of a forward pass, two a multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return sum(weights.numel() for weights in network.parameters()), counter.get_total_flops()
