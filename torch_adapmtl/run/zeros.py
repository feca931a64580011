"""The sparsity of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_adapmtl.components._prunable import prunable_by_default

__all__ = ["sparsity", "used_weights", "zeros_in"]


def sparsity(model_or_tensors: nn.Module | Tensor | Iterable[Tensor]) -> float:
    """Return the fraction of weights that are exactly zero, in [0, 1].

    For a model, the function counts the weights that are prunable by default: the weights (not the
    biases) of convolutions, transposed convolutions and linear layers, and the projections of
    `torch.nn.MultiheadAttention`. Tied weights count once. Of a weight under a parametrization or a
    pruning mask, the value that the forward pass uses is counted; of one that a layer computes
    another weight from in `forward`, the weight itself. Unused and frozen weights, which
    `Pruner.sparsity` excludes, are included.

    Args:
        model_or_tensors: A model, a tensor, or any number of tensors (each counted once).

    Raises:
        ValueError: If there is no weight to count.
        TypeError: If the argument contains anything but tensors.

    Example:
        >>> sparsity(torch.tensor([0.0, 1.0, 0.0, 2.0]))
        0.5
    """
    if isinstance(model_or_tensors, nn.Module):
        tensors = list(used_weights(model_or_tensors, _is_prunable))
    elif isinstance(model_or_tensors, Tensor):
        tensors = [model_or_tensors]
    else:
        tensors = []
        values: Iterable[object] = model_or_tensors
        for tensor in {id(value): value for value in values}.values():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"model_or_tensors must be a model, a tensor or tensors, got {tensor!r} among "
                    "them; of a state dict pass .values()"
                )
            tensors.append(tensor)
    count = sum(tensor.numel() for tensor in tensors)
    if count == 0:
        raise ValueError(
            "there is no weight to count: model_or_tensors has no convolution, linear or "
            "attention weights, or no tensors with elements"
        )
    return sum(map(zeros_in, tensors)) / count


def _is_prunable(module: nn.Module, name: str) -> bool:
    return name in prunable_by_default(module)


def used_weights(
    model: nn.Module, chosen: Callable[[nn.Module, str], bool] = lambda module, name: True
) -> Iterator[Tensor]:
    """Yield each parameter that `chosen` accepts once, as the forward pass uses it."""
    seen: set[int] = set()
    for module in model.modules():
        sources = {name: [p] for name, p in module._parameters.items() if p is not None}
        if isinstance(module, parametrize.ParametrizationList):
            # The originals are counted with the module that is parametrized.
            sources = {n: p for n, p in sources.items() if not n.startswith("original")}
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for name, chain in chains.items():
                sources[name] = [
                    p for n, p in chain._parameters.items() if n.startswith("original")
                ]
        for name, parameters in sources.items():
            plain = name.removesuffix("_orig")
            mask = module._buffers.get(f"{plain}_mask") if plain != name else None
            if mask is None:
                plain = name
            if seen.issuperset(map(id, parameters)) or not chosen(module, plain):
                continue
            seen.update(map(id, parameters))
            with torch.no_grad(), _in_eval_mode(getattr(module, "parametrizations", None)):
                tensor = getattr(module, name)
                if mask is not None:  # the attribute is outdated until the next forward pass
                    tensor = tensor * mask
            yield tensor


@contextmanager
def _in_eval_mode(module: nn.Module | None) -> Iterator[None]:
    """Keep parametrizations such as `spectral_norm` from changing their buffers."""
    modules = [] if module is None else [m for m in module.modules() if m.training]
    for m in modules:
        m.training = False
    yield
    for m in modules:
        m.training = True


def zeros_in(tensor: Tensor) -> int:
    """The number of zeros in a tensor."""
    return tensor.numel() - int(torch.count_nonzero(tensor.detach()))
