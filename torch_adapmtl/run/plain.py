"""The weights of a state dict that was saved during a run, for a model without the library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.run._packing import unpack, unpack_mask
from torch_adapmtl.tensor import shapes
from torch_adapmtl.tensor._kernels import rescaled
from torch_adapmtl.tensor.thresholding import soft_threshold

__all__ = ["plain_state_dict"]

_STATE = "adapmtl._extra_state"


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a state dict of a model with a pruner into one of the model alone.

    Use it to load a checkpoint that was saved in the course of a run where the model is not
    prepared: to evaluate it, to ship it, or for `from_pretrained` and `load_from_checkpoint`. The
    weights are those that the model computed with when it was saved, so they are as sparse as
    `Pruner.sparsity` said then; only after the zeros are fixed that is the target. The entries of
    the pruner are left out.

    Args:
        state_dict: The result of `model.state_dict()`, or of a module that contains the model.
            Nothing in it is changed. A state dict without a pruner is returned as it is, in a copy.

    Returns:
        A state dict with the keys of the model as it was before `apply_adapmtl`. (Masks that
        `torch.nn.utils.prune` had made are contained in the weights.)

    Raises:
        ValueError: If the state of the pruner is damaged, or comes from another version.

    Example:
        >>> import torch
        >>> from torch_adapmtl import apply_adapmtl, plain_state_dict
        >>> model = torch.nn.Linear(4, 4)
        >>> pruner = apply_adapmtl(
        ...     model, target_sparsity=0.5, total_steps=9, groups={"main": ["*"]}
        ... )
        >>> list(plain_state_dict(model.state_dict()))
        ['weight', 'bias']
    """
    plain = dict(state_dict)
    for key in state_dict:
        if key == _STATE or key.endswith("." + _STATE):
            _make_plain(plain, key.removesuffix(_STATE))
    return plain


@torch.no_grad()
def _make_plain(plain: dict[str, Any], prefix: str) -> None:
    pruner = prefix + "adapmtl."
    header, progress, masks = unpack(plain[prefix + _STATE])
    names = list(header.get("layers", ()))
    thresholds = plain.get(pruner + "thresholds")
    scales = plain.get(pruner + "controller.scale")
    method = header.get("method", {})
    sparse: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        path, _, tensor = name.rpartition(".")
        key = prefix + ".".join(filter(None, (path, "parametrizations", tensor, "original")))
        # The weights of other layers are sparse already, or made from the one that is.
        if thresholds is not None and key in plain:
            weight = plain[key]
            alpha = thresholds[i].to(weight.device, weight.dtype)
            value = weight if progress["fixed"] else _sparse(weight, alpha, method)
            if scales is not None and alpha and not progress["fixed"]:
                value = rescaled(value, alpha, scales[i].to(weight.device, weight.dtype))
            if (bits := masks[i]) is not None:
                value = torch.where(unpack_mask(bits, weight), value, 0.0)
            sparse[key] = value + 0.0  # every zero is +0.0
    items = list(plain.items())
    plain.clear()
    for key, item in items:
        if key in sparse:
            plain[key.replace("parametrizations.", "").removesuffix(".original")] = sparse[key]
        elif not key.startswith(pruner):
            plain[key] = item


def _sparse(weight: Tensor, alpha: Tensor, method: Mapping[str, Any]) -> Tensor:
    """The sparse weight under a method's settings, as its thresholds compute it."""
    shape = method.get("shape")
    if shape is not None and not alpha:
        return weight  # as `SoftThreshold` does, to the last bit
    if shape == "rescaled":
        return shapes.rescaled(weight, alpha)
    if shape == "power":
        return shapes.power(weight, alpha, method["power"])
    reach = method.get("reach")
    return soft_threshold(weight, alpha, reach=math.inf if reach is None else reach)
