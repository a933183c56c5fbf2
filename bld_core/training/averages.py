"""Moving averages of weights, the networks that are evaluated and kept; and averages of other lengths, made later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averaged copies of a module's parameters; plain copies of its buffers, which follow rules of their own.

    The decay warms up as (1 + step) / (10 + step), so that early averages forget the initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self._of: nn.Module | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: list[Tensor] = []

    def decay_at(self, step: int) -> float:
        """The decay of an update."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move every average towards the current weights; `step` counts from 1."""
        if self._of is not module:  # to look its weights up takes longer than to average them
            self._of, self._parameters = module, dict(module.named_parameters())
            self._averages = [self.weights[name] for name in self._parameters]
        get_ema_multi_avg_fn(self.decay_at(step))(self._averages, [*self._parameters.values()], step)  # one fused pass
        if len(self._averages) < len(self.weights):
            for name, tensor in module.state_dict().items():
                if name not in self._parameters:
                    self.weights[name].copy_(tensor)


SNAPSHOT_LENGTHS = (0.05, 0.1)
"""Of the averages that snapshots are taken of: any other is a sum of a few of these (Karras et al. 2024)."""
LONGEST = 1 / math.sqrt(12)
"""What a relative length must lie below: the average that weighs all steps alike has this one."""


class PowerEma(Ema):
    """An average that weighs the weights after step tau by tau^gamma (Karras et al. 2024, Eqs. 2, 3).

    Its length is a share of the training so far, whatever that is; at the start it holds the first step's weights.

    Args:
        module: as in `Ema`.
        length: sigma_rel, the standard deviation of tau by these weights, as a share of all steps.
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        super().__init__(module, 0.0)
        self.length, self._gamma = length, power_of_length(length)

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self._gamma + 1)


def power_of_length(length: float) -> float:
    """Gamma of sigma_rel in (0, 1/sqrt(12)): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    low, high = 0.0, 1 / length  # sigma_rel falls with gamma, and stays below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        longer = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2
        low, high = (middle, high) if longer else (low, middle)
    return low


def combination(snapshots: Sequence[tuple[int, float]], length: float) -> list[float]:
    """Coefficients of the sum of snapshots that comes closest to the average of a length (Karras et al. 2024, App. C).

    Least squares between the weights that the two sides give to every step, as functions of continuous time.

    Args:
        snapshots: step and length of each; the last step is the one at which the average is wanted.
        length: sigma_rel of the average.

    Returns:
        A coefficient for each snapshot; they add up to about 1.
    """
    steps = torch.tensor([step for step, _ in snapshots], dtype=torch.float64)
    powers = torch.tensor([power_of_length(each) for _, each in snapshots], dtype=torch.float64)
    end, power = steps[-1:], torch.tensor([power_of_length(length)], dtype=torch.float64)
    products = _products(steps, powers, steps, powers)
    return torch.linalg.lstsq(products, _products(steps, powers, end, power), driver="gelsd").solution[:, 0].tolist()


def _products(a: Tensor, gamma_a: Tensor, b: Tensor, gamma_b: Tensor) -> Tensor:
    """Integrals over tau of the products of two profiles (gamma + 1) tau^gamma / t^(gamma + 1), tau <= t: (a, b)."""
    a, gamma_a = a[:, None], gamma_a[:, None]
    ratio = torch.minimum(a, b) / torch.maximum(a, b)
    exponent = torch.where(a < b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**exponent / torch.maximum(a, b)


def combined(coefficients: Sequence[float], snapshots: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of snapshots' weights, taken in float64 one after the other; what is no real number is the last one's."""
    sums: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for coefficient, last in zip(coefficients, snapshots, strict=True):
        for name, weight in last.items():
            if weight.is_floating_point():
                sums[name] = sums.get(name, 0) + coefficient * weight.double()
    return {name: sums[name].to(weight.dtype) if name in sums else weight for name, weight in last.items()}
