"""Collective operations of processes that train one model together.

`DistributedDataParallel` and the like make gradients equal, and so the weights. Losses, and
gradients that are read before they are reduced, differ between processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["agree", "is_sharded", "mean_over_processes", "sum_over_processes", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only its part of the tensor, a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The whole tensor, gathered from all processes if it is sharded."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; a single process changes nothing."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(values: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Average over the processes where a value is accepted.

    Args:
        values: Float32 of shape (T,).
        accepted: Which of them count, bool of shape (T,).

    Returns:
        The means, and which of them come from at least one process; both as given where there is
        one process.
    """
    if not _together():
        return values, accepted
    share = accepted / dist.get_world_size()  # so that the sum of the largest numbers is finite
    total = sum_over_processes(torch.stack([values.masked_fill(~accepted, 0.0) * share, share]))
    accepted = total[1] > 0
    return (total[0] / total[1]).masked_fill(~accepted, 0.0), accepted


def agree(tensor: Tensor) -> Tensor:
    """Give all processes the boolean tensor of the first one, in place."""
    if _together():
        dist.broadcast(tensor.view(torch.uint8), 0)
    return tensor
