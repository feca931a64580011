"""Training on after pruning: zeros that nothing revives."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from ._layers import Layer
from ._selectors import Inventory, unwrap
from .pruning import attached_threshold, find_threshold
from .thresholds import SoftThreshold

__all__ = ["keep_zeros", "release_zeros"]


def keep_zeros(model: nn.Module) -> nn.Module:
    """Hold the zeros of a sparse model while it is trained on: to finetune after `finalize`.

    Every tensor of two or more dimensions that has zeros gets a mask, attached as
    [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] attaches thresholds: the model computes with
    zeros whatever momentum and weight decay make of the parameter under the mask, and no gradient
    reaches them. Parameters keep their identity, so that an optimiser made before goes on working.
    Left alone are tensors that are zero throughout, which have yet to be trained, and those that
    `torch.nn.utils.prune` masks already.

    To prune further, call `apply_adapmtl` instead, which keeps zeros too.

    Args:
        model: Any module; changed in place. A state dict that is saved meanwhile is loaded into a
            model on which the same was called.

    Returns:
        The model itself. [`release_zeros`][torch_adapmtl.release_zeros] makes it plain again.

    Raises:
        RuntimeError: If it is being pruned, or its zeros are kept already.
        ValueError: If no tensor has zeros to keep.

    Example:
        >>> import torch
        >>> from torch_adapmtl import keep_zeros, release_zeros
        >>> model = torch.nn.Linear(8, 8)
        >>> with torch.no_grad():
        ...     _ = model.weight[:6].zero_()
        >>> optimizer = torch.optim.AdamW(keep_zeros(model).parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 8)).square().sum().backward()
        ...     optimizer.step()
        >>> int((release_zeros(model).weight == 0).sum())
        48
    """
    _check_unhandled(model)
    if (name := find_threshold(model)) is not None:
        raise RuntimeError(
            f"model: {name!r} has a soft threshold, or a mask of keep_zeros, already; remove it "
            f"first, with torch.nn.utils.prune.remove or release_zeros"
        )
    layers = []
    for found in Inventory(unwrap(model), {nn.Module: "*"}, ()).prunable.values():
        weight, owners = found.parameter, tuple(found.owners)
        if weight.ndim < 2 or any(f"{name}_mask" in owner._buffers for owner, name in owners):
            continue
        # Kept in the state dict: the model has no handle that would do it.
        threshold = SoftThreshold().to(weight.device, weight.dtype)
        layer = Layer(found.names[0], "kept", owners, threshold, keep_zeros=True)
        if layer.masked:
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no tensor with zeros to keep; call keep_zeros on a "
            f"sparse model, after finalize() for instance"
        )
    for layer in layers:
        layer.attach()
    return model


def release_zeros(model: nn.Module) -> nn.Module:
    """Undo [`keep_zeros`][torch_adapmtl.keep_zeros]: a plain model, its zeros written in.

    Args:
        model: A model that `keep_zeros` was called on, or a copy of one; changed in place.

    Returns:
        The model itself.

    Raises:
        RuntimeError: If the model is being pruned: call `finalize` on its handle.
    """
    _check_unhandled(model)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            if attached_threshold(module, name) is not None:
                prune.remove(module, name)
    return model


def _check_unhandled(model: nn.Module) -> None:
    for path, module in unwrap(model).named_modules():
        if path.rpartition(".")[2] == "adapmtl" and hasattr(module, "finalize"):
            raise RuntimeError(
                "model: it is being pruned; call finalize() on its handle (model.adapmtl) first"
            )
