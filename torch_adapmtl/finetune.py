"""Finetuning of a sparse model whose zeros stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from torch_adapmtl._distributed import is_sharded
from torch_adapmtl.components._inventory import Inventory
from torch_adapmtl.components._prunable import DEFAULT_PRUNABLE
from torch_adapmtl.components._unwrap import unwrap
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer, zeros_to_keep
from torch_adapmtl.pruner import Pruner
from torch_adapmtl.tensor.soft_threshold import SoftThreshold
from torch_adapmtl.tensor.torch_prune import attached_threshold, find_threshold, put_back

__all__ = ["keep_zeros", "release_zeros"]


class _KeptZeros(SoftThreshold):
    """The mask that `keep_zeros` attaches; the class tells `release_zeros` which to remove."""


@torch.inference_mode(False)  # so that the masks can be used in training
def keep_zeros(model: nn.Module) -> nn.Module:
    """Fix the zeros of a sparse model by masks, to finetune it after `finalize`.

    Every tensor of two or more dimensions that has zeros gets a mask, attached in the same way as
    [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] attaches thresholds. The model computes with
    zeros even if momentum or weight decay changes the parameter under the mask, and pruned weights
    receive no gradient. Parameters keep their identity, so an optimiser made before still works.

    Two kinds of tensors get no mask: tensors of zeros only, which have not been trained yet, and
    embeddings in which only the padding row is zero, because nothing trains that row.

    To prune further, call `apply_adapmtl` instead, which keeps zeros too.

    Args:
        model: Any module; changed in place. A state dict saved between `keep_zeros` and
            `release_zeros` must be loaded into a model on which `keep_zeros` was called.

    Returns:
        The model itself. [`release_zeros`][torch_adapmtl.release_zeros] removes the masks.

    Raises:
        RuntimeError: If the model is being pruned, or its zeros are kept already.
        ValueError: If no tensor has zeros to keep, or a tensor with zeros is computed from several
            parameters (by `weight_norm`, for instance) or has sparse gradients.

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
    _check_unprepared(model)
    if (name := find_threshold(model)) is not None:
        raise RuntimeError(
            f"model: {name!r} has a soft threshold, or a mask of keep_zeros, already; remove it "
            f"first, with torch.nn.utils.prune.remove or release_zeros"
        )
    _check_single(model)
    layers = []
    everything = dict.fromkeys((*DEFAULT_PRUNABLE, nn.Module), "*")
    for tensor in Inventory(unwrap(model), everything, ()).prunable.values():
        weight, owners = tensor.parameter, tuple(tensor.owners)
        if weight.ndim < 2 or _only_padding(weight, owners):
            continue
        mask = zeros_to_keep(*owners[0], keep_zeros=True)
        if mask is not None and not bool(mask.all()):
            # A persistent threshold: the model has no pruner that would save the mask.
            threshold = _KeptZeros().to(weight.device, weight.dtype)
            layer = Layer(tensor.names[0], "kept", owners, mask, threshold)
            _check_dense_gradient(layer)
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no tensor with zeros to keep; call keep_zeros on a "
            f"sparse model, after finalize() for instance"
        )
    Layers(layers).attach()
    return model


def release_zeros(model: nn.Module) -> nn.Module:
    """Undo [`keep_zeros`][torch_adapmtl.keep_zeros]: write the zeros, remove the masks.

    Args:
        model: A model on which `keep_zeros` was called, or a copy of one; changed in place.

    Returns:
        The model itself.

    Raises:
        RuntimeError: If the model is being pruned (call `finalize` on its pruner), or is sharded.

    Example:
        >>> import torch
        >>> from torch_adapmtl import keep_zeros, release_zeros
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> list(release_zeros(keep_zeros(model)).state_dict())
        ['weight']
    """
    _check_unprepared(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise RuntimeError(
                f"model: {name!r} is sharded (fully_shard), so that masks cannot be taken off in "
                f"place: gather its state with torch.distributed.checkpoint.state_dict."
                f"get_model_state_dict (full_state_dict=True), load it into a whole model on which "
                f"keep_zeros was called, and release that"
            )
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            threshold = attached_threshold(module, name)
            if isinstance(threshold, _KeptZeros):
                prune.remove(module, name)
                put_back(module, name, threshold)
    return model


def _only_padding(weight: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether all zeros are in an embedding's padding row, which is never trained."""
    for owner, _ in owners:
        padding = getattr(owner, "padding_idx", None)
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and padding is not None:
            zero = weight.detach() == 0
            zero[padding] = False
            return not bool(zero.any())
    return False


def _check_dense_gradient(layer: Layer) -> None:
    for owner, _ in layer.owners:
        if getattr(owner, "sparse", False) is True:
            raise ValueError(
                f"model: {layer.name!r} has zeros and sparse gradients ({type(owner).__name__} "
                f"with sparse=True), which cannot be masked: set module.sparse = False first"
            )


def _check_single(model: nn.Module) -> None:
    for path, module in model.named_modules():
        parametrized: Any = getattr(module, "parametrizations", {})
        for name, chain in parametrized.items():
            if not hasattr(chain, "original"):
                zero = getattr(module, name) == 0
                if zero.ndim >= 2 and bool(zero.any()) and not bool(zero.all()):
                    raise ValueError(
                        f"model: {path + '.' + name!r} has zeros, but {type(chain[0]).__name__} "
                        f"makes it from several tensors, which would not keep them: call "
                        f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) "
                        f"first"
                    )


def _check_unprepared(model: nn.Module) -> None:
    if any(isinstance(module, Pruner) for module in model.modules()):
        raise RuntimeError(
            "model: it is being pruned; call finalize() on its pruner (model.adapmtl) first"
        )
