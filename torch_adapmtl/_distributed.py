"""Collective operations of processes that train one model together.

`DistributedDataParallel` and similar wrappers make the gradients equal in all processes, and so the
weights. Losses differ between processes, and so do gradients before they are reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = [
    "agree",
    "is_sharded",
    "local",
    "local_mask",
    "mean_over_processes",
    "sharded_like",
    "sum_over_processes",
    "whole",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return the whole tensor, gathered from all processes if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def local(tensor: Any) -> Tensor:
    """Return the part of a sharded tensor that this process holds; other tensors as they are.

    Call it under `no_grad`.
    """
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def local_mask(mask: Any, weight: Any) -> Tensor:
    """Return the part of a whole mask that belongs to this process's part of a weight."""
    return local(sharded_like(weight, mask) if is_sharded(weight) else mask)


def sharded_like(weight: Any, values: Tensor) -> Tensor:
    """Shard a whole tensor, which all processes have, in the same way as a weight."""
    from torch.distributed.tensor import distribute_tensor

    # With `src_data_rank=None` nothing is sent.
    return distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; with a single process, do nothing."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(values: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Average each value over the processes that accept it.

    Args:
        values: Float32 of shape (T,).
        accepted: Whether this process accepts each value, bool of shape (T,).

    Returns:
        The means, and whether any process accepts each value. With a single process, the arguments
        are returned unchanged.
    """
    if not _together():
        return values, accepted
    share = accepted / dist.get_world_size()  # divided first, so that the sum stays finite
    total = sum_over_processes(torch.stack([values.masked_fill(~accepted, 0.0) * share, share]))
    accepted = total[1] > 0
    return (total[0] / total[1]).masked_fill(~accepted, 0.0), accepted


def agree(tensor: Tensor) -> Tensor:
    """Copy the tensor of the first process, with at least one dimension, to all others in place."""
    if _together():
        dist.broadcast(tensor.view(torch.uint8), 0)
    return tensor
