"""A layer: a prunable tensor, the modules that hold it, and its soft threshold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_adapmtl._distributed import is_sharded, sharded_like, whole
from torch_adapmtl.tensor.thresholding import SoftThreshold
from torch_adapmtl.tensor.torch_prune import (
    attach_threshold,
    attached_threshold,
    detach_threshold,
    held_parameter,
    is_masked,
    put_back,
    take_earlier_mask,
)

__all__ = ["Layer", "count_zeros", "shaped_like", "zeros_to_keep"]


@dataclass(eq=False)
class Layer:
    """A prunable tensor, the modules that hold it, and its soft threshold.

    Attributes:
        name: The tensor's first qualified name in the model.
        component: The component it belongs to.
        owners: Every `(module, tensor name)` that holds it; several if the weight is tied.
        initial_mask: False for the zeros that were fixed when the run began, bool in the weight's
            shape; None if there were none.
        threshold: The threshold, the same for all owners; a controller sets it.
        dense: Whether the parameter holds the dense weight. While a controller is called it does.
            Between the steps of an optimiser it holds the sparse weight, unless the threshold is
            trained.
        positions: The number of multiply-adds that each of its weights takes part in, for one
            example; None if it is not known.
    """

    name: str
    component: str
    owners: tuple[tuple[nn.Module, str], ...]
    initial_mask: Tensor | None = None
    threshold: SoftThreshold = field(default_factory=SoftThreshold)
    dense: bool = True
    positions: float | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, looked up at each access because loading a state dict may replace it."""
        return held_parameter(*self.owners[0])

    @property
    def held(self) -> nn.Parameter | None:
        """The parameter, or None if the model has lost it, which its pruner reports."""
        try:
            return self.weight
        except ValueError:
            return None

    @property
    def mask(self) -> Tensor | None:
        """False for the zeros that a mask fixes, bool in the weight's shape; None for no mask."""
        return self.threshold.mask

    @property
    def key(self) -> str:
        """The name of the parameter in the model's state dict."""
        module, name = self.owners[0]
        if name in module._parameters:
            return self.name
        path = self.name[: -len(name)]
        return f"{path}parametrizations.{name}.original"

    def problem(self, parameters: Collection[int]) -> str:
        """Explain why the model does not compute with this weight; an empty string if it does.

        Args:
            parameters: The `id` of each parameter of the model.
        """
        remedy = (
            "change the model before apply_adapmtl, or leave this layer out (exclude=). To go on "
            "without pruning, call undo()"
        )
        try:
            weight = self.weight
        except ValueError as error:
            return f"is no longer a parameter of its module ({error}): {remedy}"
        if id(weight) not in parameters:
            return (
                f"is no longer in the model: its module was replaced or removed after "
                f"apply_adapmtl, or the model computes with a copy of it: {remedy}"
            )
        for module, name in self.owners:
            if self.threshold.trained:
                if attached_threshold(module, name) is not self.threshold:
                    return (
                        "has lost its soft threshold (by torch.nn.utils.prune.remove, for "
                        "instance) while the model is being pruned: call finalize() instead of "
                        "removing thresholds one by one"
                    )
            elif is_masked(module, name):
                return (
                    "was masked by torch.nn.utils.prune after apply_adapmtl, so that more of it is "
                    "zero than is counted: remove that mask (torch.nn.utils.prune.remove), or "
                    "prune before apply_adapmtl, which keeps the zeros"
                )
        return ""

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weight (`fully_shard`)."""
        return is_sharded(self.weight)

    def values(self) -> Tensor:
        """Return the weight, detached; gathered from all processes if it is sharded."""
        return whole(self.weight.detach())

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Write values into the weight; if it is sharded, each process writes its part."""
        self.weight.copy_(sharded_like(self.weight, values) if self.sharded else values)

    @torch.no_grad()
    def sparse(self) -> Tensor:
        """Return the sparse weight, which the model computes with; whole if it is sharded."""
        weight = self.values()
        if self.dense:
            weight = self.threshold(weight)
        return weight

    def attach(self) -> None:
        """Attach the threshold with the initial mask, in every module that holds the tensor."""
        attach = attach_threshold if self.threshold.trained else take_earlier_mask
        for module, name in self.owners:
            attach(module, name, self.threshold)
        self.threshold.mask = self.initial_mask

    def remove(self, *, bake: bool = True) -> None:
        """Remove the threshold, and restore an earlier mask of `torch.nn.utils.prune`.

        Args:
            bake: Whether to write the sparse weight into the parameter.
        """
        if bake:
            with torch.no_grad():
                if self.threshold.trained:
                    self.weight.copy_(self.sparse())
                self.weight.add_(0.0)  # makes every zero +0.0
        for module, name in self.owners:
            if attached_threshold(module, name) is self.threshold:
                detach_threshold(module, name)
            put_back(module, name, self.threshold)


def zeros_to_keep(module: nn.Module, name: str, *, keep_zeros: bool) -> Tensor | None:
    """Return the initial mask of a plain tensor, False for fixed zeros; None if there are none.

    Zeros under a mask of `torch.nn.utils.prune` are fixed, and with `keep_zeros` all other zeros
    too. A tensor of zeros only is taken for one that has not been trained yet: `keep_zeros` fixes
    none of its zeros.
    """
    pruned = module._buffers.get(name + "_mask")
    mask = None if pruned is None else pruned != 0
    if keep_zeros:
        weight = whole(held_parameter(module, name).detach())
        # Counting allocates no memory, and most tensors have no zeros.
        if 0 < int(torch.count_nonzero(weight)) < weight.numel():
            mask = weight != 0 if mask is None else mask & (weight != 0)
    return mask


def count_zeros(mask: Tensor | None) -> int:
    """Return the number of zeros that a mask fixes."""
    return 0 if mask is None else mask.numel() - int(torch.count_nonzero(mask))


def shaped_like(weight: Tensor, mask: Tensor) -> Tensor:
    """Reshape a flat mask to the shape and the memory format of `weight`."""
    # The masked weight takes the memory format of its mask, and so does the convolution.
    if is_sharded(weight):  # the mask is not sharded: forward passes gather the weight
        return mask.view(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.view(weight.shape))
