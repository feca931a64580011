"""Finetuning of a sparse model whose zeros stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torch_adapmtl.components._inventory import Inventory
from torch_adapmtl.components._prunable import DEFAULT_PRUNABLE
from torch_adapmtl.components._unwrap import unwrap
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer, zeros_to_keep
from torch_adapmtl.layers.sparse_weights import (
    SparseWeights,
    pruned_parameter,
    stop_watching,
    watch_forward,
)
from torch_adapmtl.pruner import Pruner
from torch_adapmtl.tensor.thresholding import SoftThreshold
from torch_adapmtl.tensor.torch_prune import SoftThresholdPruning

__all__ = ["keep_zeros", "release_zeros"]

_NAME = "kept_zeros"


class _KeptZeros(nn.Module):
    """The submodule of a model whose zeros are kept; it has no parameters, buffers or state."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.sparse_weights = SparseWeights(layers, fixed=True)
        # torch.nn.utils.prune.is_pruned(model) looks for a hook of this class.
        self.register_forward_pre_hook(SoftThresholdPruning())
        self.register_load_state_dict_post_hook(_renew_masks)  # type: ignore[no-untyped-call]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module alone, for the reasons given in `Pruner.named_modules`."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is self:
                yield name, module

    def forward(self, *args: Any) -> Any:
        """Return the input unchanged, because a model may call all its child modules in turn."""
        return args[0] if len(args) == 1 else args


@torch.inference_mode(False)  # so that the masks can be used in training
def keep_zeros(model: nn.Module) -> nn.Module:
    """Fix the zeros of a sparse model by masks, to finetune it after `finalize`.

    Every tensor of two or more dimensions that has zeros gets a mask. Gradients of the zeros are
    set to zero, and after each step of an optimiser the zeros are written again, so that neither
    momentum nor weight decay changes them. Modules, parameters and keys of the state dict stay as
    they are, and an optimiser made before still works. If a state dict is loaded into the whole
    model, the zeros of the weights in it are kept from then on.

    Two kinds of tensors get no mask: tensors of zeros only, which have not been trained yet, and
    embeddings in which only the padding row is zero, because nothing trains that row.

    To prune further, call `apply_adapmtl` instead, which keeps zeros too.

    Args:
        model: Any module. It gets a submodule without parameters, `kept_zeros`.

    Returns:
        The model itself. [`release_zeros`][torch_adapmtl.release_zeros] removes the masks.

    Raises:
        RuntimeError: If the model is being pruned, or its zeros are kept already.
        ValueError: If no tensor has zeros to keep, a tensor with zeros is computed from several
            parameters (by `weight_norm`, for instance), or the model has an attribute `kept_zeros`.

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
    if (name := pruned_parameter(model)) is not None:
        raise RuntimeError(f"model: the zeros of {name!r} are kept already: leave out this call")
    if hasattr(model, _NAME):
        raise ValueError(
            f"model: it has an attribute {_NAME!r}, where the masks are put: rename it"
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
            threshold = SoftThreshold(persistent=False).to(weight.device, weight.dtype)
            layers.append(Layer(tensor.names[0], "kept", owners, mask, threshold))
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no tensor with zeros to keep; call keep_zeros on a "
            f"sparse model, after finalize() for instance"
        )
    collection = Layers(layers)
    collection.attach()
    model._modules[_NAME] = kept = _KeptZeros(collection)
    kept.sparse_weights.attach()
    watch_forward(model)
    return model


def release_zeros(model: nn.Module) -> nn.Module:
    """Undo [`keep_zeros`][torch_adapmtl.keep_zeros]: remove the masks.

    Args:
        model: A model on which `keep_zeros` was called, or a copy of one; changed in place.

    Returns:
        The model itself.

    Raises:
        RuntimeError: If the model is being pruned (call `finalize` on its pruner).

    Example:
        >>> import torch
        >>> from torch_adapmtl import keep_zeros, release_zeros
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> list(release_zeros(keep_zeros(model)).state_dict())
        ['weight']
    """
    _check_unprepared(model)
    for module in list(model.modules()):
        kept = module._modules.get(_NAME)
        if isinstance(kept, _KeptZeros):
            kept.sparse_weights.release()
            stop_watching(module)
            del module._modules[_NAME]
    return model


@torch.inference_mode(False)
def _renew_masks(kept: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(kept, _KeptZeros)
    for layer in kept.sparse_weights.layers:
        layer.threshold.mask = zeros_to_keep(*layer.owners[0], keep_zeros=True)


def _only_padding(weight: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether all zeros are in an embedding's padding row, which is never trained."""
    for owner, _ in owners:
        padding = getattr(owner, "padding_idx", None)
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and padding is not None:
            zero = weight.detach() == 0
            zero[padding] = False
            return not bool(zero.any())
    return False


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
