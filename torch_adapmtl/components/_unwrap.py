"""The module inside wrappers such as `torch.compile` and DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DistributedDataParallel and DataParallel.

    Wrappers may be nested. A module without one is returned as it is.

    Raises:
        TypeError: If `model` is no module, or a scripted one.

    Example:
        >>> import torch
        >>> from torch_adapmtl.components._unwrap import unwrap
        >>> net = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(net)) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {_describe(model)}; pass the model itself"
        )
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model is a torch.jit.ScriptModule, whose layers cannot be changed; prune the "
                "module that it was scripted from, and script it after finalize()"
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_orig_mod"), nn.Module) or isinstance(
            inner := model._modules.get("_orig_mod"), nn.Module
        ):
            model = inner
        else:
            return model


def _describe(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
