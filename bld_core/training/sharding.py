"""Weights shared out over the replicas (fully sharded data parallelism): each keeps a part of every tensor.

A tensor that is shared out is a DTensor, whose first dimension is cut into as many parts as there are replicas. So are
the gradients, moments and averages made of it, and a replica has them whole only as long as it needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bld_core.training.layers import Layers
from bld_core.training.replicas import ReducePrecision, rank_and_world

# DTensor's module takes a second to import, so it is imported where weights are shared out, and nowhere else.


def shard(module: nn.Module, device: torch.device, reduce_precision: ReducePrecision = "float32") -> nn.Module:
    """Share out a network's weights over the replicas, in place: each block by itself, and the rest (FSDP2).

    Forward and backward passes gather the weights of one block at a time, and leave each replica its part of the mean
    gradient. With one replica there is nothing to share.

    Args:
        module: all replicas must have the same, in the memory of the host: no device need hold all of it.
        device: of this replica, where its part goes.
        reduce_precision: of gradients on their way.

    Returns:
        The same network.
    """
    world = rank_and_world()[1]
    if world == 1:
        return module.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_precision == "bfloat16" else None)
    blocks = [layer for layers in module.modules() if isinstance(layers, Layers) for layer in layers]
    for part in [*blocks, module]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # also where no gradient is wanted
    return module


def is_sharded(x: Tensor) -> bool:
    """Whether this replica keeps a part of a tensor, others the rest."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """All of a tensor that is shared out, for which every replica must ask; any other as it is."""
    sharded: Any = x
    return sharded.full_tensor() if is_sharded(x) else x


def own(x: Tensor) -> Tensor:
    """The part of a tensor that this replica keeps, the same memory; any other as it is."""
    sharded: Any = x
    return sharded.to_local() if is_sharded(x) else x


def shared_as(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every replica has, shared out as another one is; as it is where that is not."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(x.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole_share(parts_NaB: Tensor, like: Tensor) -> Tensor:
    """Some of N matrices whole, on each replica others of them: (n, A, B), for which all must ask.

    Args:
        parts_NaB: this replica's rows of each of them, stacked.
        like: one of the matrices; where these are not shared out, all are whole already.
    """
    if not is_sharded(like):
        return parts_NaB
    from torch.distributed.tensor import Shard

    return _stack(parts_NaB, like, len(parts_NaB), 1).redistribute(placements=[Shard(0)]).to_local()


def own_rows(matrices_nAB: Tensor, like: Tensor, count: int) -> Tensor:
    """The inverse of `whole_share`: this replica's rows of each of `count` matrices, (N, a, B)."""
    if not is_sharded(like):
        return matrices_nAB
    from torch.distributed.tensor import Shard

    return _stack(matrices_nAB, like, count, 0).redistribute(placements=[Shard(1)]).to_local()


def _stack(here: Tensor, like: Tensor, count: int, dim: int) -> Any:
    """A stack of matrices that replicas share out by one of its dimensions."""
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = like
    rows, columns = like.shape
    shape, stride = torch.Size((count, rows, columns)), (rows * columns, columns, 1)
    return DTensor.from_local(here.contiguous(), sharded.device_mesh, [Shard(dim)], shape=shape, stride=stride)
