"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, all those of one shape at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bld_core.training.sharding import own, own_rows, whole_share

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95
_EPS = 1e-7


def orthogonalized(matrices_NAB: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz iterations (Jordan et al. 2024).

    X <- a X + (b S + c S^2) X with S = X X^T, from X of Frobenius norm 1; a, b and c make small singular values grow
    fastest, and leave those above .02 at .65 to 1.25.

    Args:
        matrices_NAB: any float type, in whose arithmetic it is computed.

    Returns:
        The same shape and type.
    """
    a, b, c = _COEFFICIENTS
    x = matrices_NAB / matrices_NAB.norm(dim=(1, 2), keepdim=True).clamp_min(_EPS)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum .95, for all matrices of a shape at once, and a flag to do nothing.

    Orthogonalises in bfloat16 on a GPU, as that does everywhere, and in float32 on a CPU: one without instructions for
    bfloat16 takes many times as long in it (benchmarks/RESULTS.md), and those that have some gain nothing.

    Args:
        matrices: 2-D weights.
        lr: length of a step: the root mean square of an update is about lr / sqrt(max(A, B)) sqrt(max(1, A/B)).
        weight_decay: decoupled, times lr.

    Attributes:
        found_inf: float32 scalar on the device of the weights; where it is 1, a step changes nothing.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all matrices that have a gradient."""
        assert closure is None, "nothing of ours has one"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._move(matrices, group["lr"], group["weight_decay"])

    def _move(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """A step of matrices of one shape."""
        rows, columns = matrices[0].shape
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [own(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        gradient = torch.stack([own(matrix.grad) for matrix in matrices if matrix.grad is not None])
        momentum = torch.stack(momenta)
        good: Tensor | float = 1.0
        if self.found_inf is not None:  # what is not finite must not even be multiplied by 0
            gradient, good = torch.where(self.found_inf > 0, momentum, gradient), 1 - self.found_inf
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        update = gradient.lerp_(momentum, _MOMENTUM)
        update = whole_share(update.bfloat16() if update.is_cuda else update, matrices[0])
        update = own_rows(orthogonalized(update), matrices[0], len(matrices)).to(momentum.dtype)
        rate = lr * math.sqrt(max(1.0, rows / columns))
        kept = 1 - good * (lr * weight_decay)
        for matrix, held, new, direction in zip(matrices, momenta, momentum, update, strict=True):
            held.copy_(new)
            own(matrix).mul_(kept).sub_(direction * (good * rate))
