"""A step that does nothing where it would do harm, decided on the device; the host hears of it later."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A scalar that a device is still computing, on its way to the host: to read it waits for nothing told since."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._there = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> float:
        """The value."""
        if self._there is not None:
            self._there.synchronize()
        return float(self._value)


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of an optimizer, fused AdamW or Muon; where `bad`, a float32 scalar, is 1, it does nothing."""
    setattr(optimizer, "found_inf", bad)  # noqa: B010  # what gradient scalers set; AdamW's class does not declare it
    optimizer.step()
