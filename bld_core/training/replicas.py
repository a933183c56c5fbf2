"""The replicas of a training run: who and how many they are, and what they agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def place() -> tuple[int, int]:
    """(rank, world) of this training replica; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_replicas(x: Tensor) -> Tensor:
    """Sum x over all replicas, in place: every replica must call it, and all get the same bits. Returns x."""
    if place()[1] > 1:
        distributed.all_reduce(x)
    return x
