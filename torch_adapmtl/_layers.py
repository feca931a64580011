"""What the controllers work on: prunable tensors with a soft threshold, grouped by component."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .thresholds import SoftThreshold, attach_threshold, attached_threshold, detach_threshold

__all__ = ["Layer", "PerComponent", "apply_keeping_dtype"]


@dataclass(eq=False)
class Layer:
    """A prunable tensor, the modules that hold it, and the soft threshold on it.

    Attributes:
        name: The tensor's first qualified name in the model.
        component: The component it belongs to.
        owners: Every `(module, tensor name)` that holds it; several if the weight is tied.
        threshold: The parametrization, one for all owners.
        earlier_mask: The mask that `torch.nn.utils.prune` had put on it before, or None.
    """

    name: str
    component: str
    owners: tuple[tuple[nn.Module, str], ...]
    threshold: SoftThreshold
    earlier_mask: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, looked up anew because loading a state dict may replace it."""
        module, name = self.owners[0]
        if self.attached:
            parametrizations: Any = module.parametrizations
            parameter: nn.Parameter = parametrizations[name].original
            return parameter
        plain = module._parameters.get(name)  # torch.nn.utils.prune renames what it masks
        plain = module._parameters[name + "_orig"] if plain is None else plain
        assert plain is not None
        return plain

    @property
    def attached(self) -> bool:
        """Whether the threshold is still there; `prune.remove` may have taken it off."""
        return attached_threshold(*self.owners[0]) is self.threshold

    @torch.no_grad()
    def sparse(self) -> Tensor:
        """The weight as the model sees it."""
        weight: Tensor = self.threshold(self.weight)
        return weight

    def attach(self) -> None:
        """Put the threshold on the tensor wherever it is held."""
        for module, name in self.owners:
            attach_threshold(module, name, self.threshold)
        self.earlier_mask = self.threshold.mask

    def remove(self, *, bake: bool = True) -> None:
        """Leave the plain parameter, with the sparse weight written into it unless told not to.

        A mask that `torch.nn.utils.prune` had put there before is put back.
        """
        sparse = self.sparse()
        for module, name in self.owners:
            parameter = detach_threshold(module, name)
            if bake:
                with torch.no_grad():
                    parameter.copy_(sparse)
            if self.earlier_mask is not None:
                prune.custom_from_mask(module, name, self.earlier_mask)


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
        tensor = self._parameters.get(component)
        tensor = self._buffers.get(component) if tensor is None else tensor
        assert tensor is not None
        return tensor


def apply_keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make `nn.Module._apply`'s function move devices only: statistics stay in their precision."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def members(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """The indices of each component's layers; components in the order of their first layer."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(layer.component, []).append(index)
    return found
