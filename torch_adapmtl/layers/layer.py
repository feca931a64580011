"""One prunable tensor, the modules that hold it, and the soft threshold on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._distributed import is_sharded, whole
from torch_adapmtl.tensor.soft_threshold import SoftThreshold
from torch_adapmtl.tensor.torch_prune import (
    attach_threshold,
    attached_threshold,
    detach_threshold,
    held_parameter,
    put_back,
)

__all__ = ["Layer", "count_zeros", "shaped_like", "zeros_to_keep"]


@dataclass(eq=False)
class Layer:
    """A prunable tensor, the modules that hold it, and the soft threshold on it.

    Attributes:
        name: The tensor's first qualified name in the model.
        component: The component it belongs to.
        owners: Every `(module, tensor name)` that holds it; several if the weight is tied.
        initial_mask: Which weights were not zero for good when the run began, bool in the weight's
            shape; None for all.
        threshold: The parametrization, one for all owners; a controller puts its own here.
    """

    name: str
    component: str
    owners: tuple[tuple[nn.Module, str], ...]
    initial_mask: Tensor | None = None
    threshold: SoftThreshold = field(default_factory=SoftThreshold)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, looked up anew because loading a state dict may replace it."""
        return held_parameter(*self.owners[0])

    @property
    def mask(self) -> Tensor | None:
        """Which weights may be nonzero, bool in the weight's shape; None if all may."""
        return self.threshold.mask

    @property
    def attached(self) -> bool:
        """Whether the threshold is on the tensor; `prune.remove` may have taken it off."""
        return all(self._is_on(module, name) for module, name in self.owners)

    def _is_on(self, module: nn.Module, name: str) -> bool:
        return attached_threshold(module, name) is self.threshold

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of the weight (`fully_shard`)."""
        return is_sharded(self.weight)

    def values(self) -> Tensor:
        """The weight without its history; gathered from all processes if it is sharded."""
        return whole(self.weight.detach())

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Write values into the weight, of which each process keeps its part if it is sharded."""
        weight: Any = self.weight
        if self.sharded:
            from torch.distributed.tensor import distribute_tensor

            # All processes have the same values: nothing is sent.
            mesh, placements = weight.device_mesh, weight.placements
            values = distribute_tensor(values, mesh, placements, src_data_rank=None)
        weight.copy_(values)

    @torch.no_grad()
    def sparse(self) -> Tensor:
        """The weight as the model sees it."""
        weight: Tensor = self.threshold(self.values())
        return weight

    def attach(self) -> None:
        """Put the threshold on the tensor wherever it is held, with the initial mask."""
        for module, name in self.owners:
            attach_threshold(module, name, self.threshold)
        self.threshold.mask = self.initial_mask

    def remove(self, *, bake: bool = True) -> None:
        """Leave the plain parameter, with the sparse weight written into it unless told not to.

        A mask that `torch.nn.utils.prune` had put there before is put back.
        """
        sparse = self.sparse() if bake else None
        for module, name in self.owners:
            if not self._is_on(module, name):  # removed by `prune.remove`, or never put there
                continue
            parameter = detach_threshold(module, name)
            if sparse is not None:
                with torch.no_grad():
                    parameter.copy_(sparse)
            put_back(module, name, self.threshold)


def zeros_to_keep(module: nn.Module, name: str, *, keep_zeros: bool) -> Tensor | None:
    """Which weights of a plain tensor are not zero for good, bool in its shape; None for all.

    Masks of `torch.nn.utils.prune` hold zeros for good, and so does `keep_zeros` the zeros that
    the tensor has. A tensor that is zero throughout has yet to be trained, and is free.
    """
    pruned = module._buffers.get(name + "_mask")
    mask = None if pruned is None else pruned != 0
    if keep_zeros:
        weight = held_parameter(module, name).detach()
        # Counting allocates nothing, and most tensors turn out to have no zeros.
        if 0 < int(torch.count_nonzero(weight)) < weight.numel():
            mask = weight != 0 if mask is None else mask & (weight != 0)
    return mask


def count_zeros(mask: Tensor | None) -> int:
    """The number of weights that a mask holds at zero."""
    return 0 if mask is None else mask.numel() - int(torch.count_nonzero(mask))


def shaped_like(weight: Tensor, mask: Tensor) -> Tensor:
    """Bring a flat mask into the shape and the memory format of `weight`."""
    # A mask of another format would pass it on to the weight and so to the convolution.
    if is_sharded(weight):  # forward passes see it whole
        return mask.view(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.view(weight.shape))
