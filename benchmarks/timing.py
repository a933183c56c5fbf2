"""What the benchmarks share: clocks that wait for a GPU, and the rate of a large matrix product as the limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """How long some work takes, until the device has done it."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(works: Sequence[Callable[[], object]], repeats: int, device: str = "cpu") -> list[float]:
    """The median seconds of each of several works, done in turns, so that noise of the machine meets them all."""
    times = [[seconds(work, device) for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int = 2048) -> float:
    """Multiply-adds a second of a large matrix product, in billions; the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(5)) / 1e9
