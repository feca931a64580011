"""What the controllers work on: prunable tensors with a soft threshold, grouped by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._distributed import is_sharded, whole
from torch_adapmtl.tensor.torch_prune import (
    attach_threshold,
    attached_threshold,
    detach_threshold,
    held_parameter,
    put_back,
)
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = [
    "Layer",
    "PerComponent",
    "attach_all",
    "check_ties",
    "count_gone",
    "members",
    "shaped_like",
]


@dataclass(eq=False)
class Layer:
    """A prunable tensor, the modules that hold it, and the soft threshold on it.

    Attributes:
        name: The tensor's first qualified name in the model.
        component: The component it belongs to.
        owners: Every `(module, tensor name)` that holds it; several if the weight is tied.
        threshold: The parametrization, one for all owners.
        keep_zeros: Whether weights that are zero before it is attached stay zero.
        given_mask: Which weights were not zero for good when it was attached; None for all.
    """

    name: str
    component: str
    owners: tuple[tuple[nn.Module, str], ...]
    threshold: SoftThreshold
    keep_zeros: bool = False
    given_mask: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, looked up anew because loading a state dict may replace it."""
        return held_parameter(*self.owners[0])

    def alive(self) -> Tensor | None:
        """Which weights are not zero for good, bool in the weight's shape; None if all are alive.

        Gone are those that a mask has taken and, before the threshold is attached, the zeros to
        keep. A tensor that is zero throughout is waiting to be trained, and all alive.
        """
        if self.attached:
            return self.threshold.mask
        module, name = self.owners[0]
        earlier = module._buffers.get(name + "_mask")
        alive = None if earlier is None else earlier != 0
        nonzero = self.weight.detach() != 0
        if self.keep_zeros and bool(nonzero.any()) and not bool(nonzero.all()):
            alive = nonzero if alive is None else alive & nonzero
        return alive

    @property
    def masked(self) -> int:
        """How many weights are zero for good."""
        return count_gone(self.alive())

    @property
    def attached(self) -> bool:
        """Whether the threshold is still there; `prune.remove` may have taken it off."""
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
        """Put the threshold on the tensor wherever it is held."""
        given = self.alive()
        for module, name in self.owners:
            attach_threshold(module, name, self.threshold)
        self.threshold.mask = self.given_mask = given

    def remove(self, *, bake: bool = True) -> None:
        """Leave the plain parameter, with the sparse weight written into it unless told not to.

        A mask that `torch.nn.utils.prune` had put there before is put back.
        """
        sparse = self.sparse()
        for module, name in self.owners:
            if not self._is_on(module, name):  # removed by `prune.remove`, or never put there
                continue
            parameter = detach_threshold(module, name)
            if bake:
                with torch.no_grad():
                    parameter.copy_(sparse)
            put_back(module, name, self.threshold)


def check_ties(layers: Sequence[Layer]) -> None:
    """Raise a `ValueError` if `torch.nn.utils.prune` masks a tied weight not alike everywhere."""
    for layer in layers:
        masks = [module._buffers.get(name + "_mask") for module, name in layer.owners]
        first = masks[0]
        for mask in masks[1:]:
            if (first is None) != (mask is None) or (
                first is not None and mask is not None and not torch.equal(first, mask)
            ):
                raise ValueError(
                    f"{layer.name!r} is tied, and torch.nn.utils.prune masks it differently in the "
                    f"{len(masks)} modules that hold it: give all of them the same mask "
                    f"(prune.custom_from_mask), or remove it"
                )


def attach_all(layers: Sequence[Layer]) -> None:
    """Put the thresholds on all the layers, or on none if one refuses."""
    begun = []
    try:
        for layer in layers:
            begun.append(layer)
            layer.attach()
    except Exception:
        for layer in begun:
            layer.remove(bake=False)
        raise


class PerComponent(nn.Module):
    """One tensor for each component, under the component's own name in the state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # Straight into the dicts: a task may well be called "type" or "training".
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor

    def __getitem__(self, component: str) -> Tensor:
        held: Mapping[str, Tensor | None] = (
            self._parameters if component in self._parameters else self._buffers
        )
        tensor = held[component]
        assert tensor is not None
        return tensor


def members(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """The indices of each component's layers; components in the order of their first layer."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(layer.component, []).append(index)
    return found


def count_gone(alive: Tensor | None) -> int:
    """How many weights a mask has taken."""
    return 0 if alive is None else int((~alive).sum())


def shaped_like(weight: Tensor, mask: Tensor) -> Tensor:
    """Bring a flat mask into the shape and the memory format of `weight`."""
    # Of another format, it would pass that on to the weight and so to the convolution.
    if is_sharded(weight):  # forward passes see it whole
        return mask.view(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.view(weight.shape))
