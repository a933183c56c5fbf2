"""What the benchmarks share: clocks that wait for a GPU, and the rate of a large matrix product as the limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_PRODUCTS = 50


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


def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Multiply-adds a second of a large matrix product, in billions; the best of five.

    On a GPU a product is of 8192 x 8192, and one of the five is the mean of 50 without a wait, by the GPU's own clock,
    so that neither the start of a kernel nor its first clock rate counts.
    """
    on_cpu = 2048 if dtype == torch.float32 else 512  # without instructions for a type a large product takes minutes
    size = 8192 if device == "cuda" else on_cpu
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if device != "cuda":
        return size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(5)) / 1e9
    out = torch.empty_like(a)
    times: list[float] = []
    for _ in range(6):  # the first warms up
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=out)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000 / _PRODUCTS)
    return size**3 / min(times[1:]) / 1e9
