"""The sparsity and the size of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_adapmtl._tables import html_table
from torch_adapmtl.components._prunable import prunable_by_default

__all__ = ["ModelSize", "size", "sparsity"]


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
        tensors = list(_weights(model_or_tensors, _is_prunable))
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
    return sum(map(_zeros, tensors)) / count


@dataclass(frozen=True)
class ModelSize:
    """The size of a model's parameters, dense and in two sparse formats.

    For a tensor of n elements of b bytes each, of which v are nonzero:

    - dense: ``n * b``;
    - as bitmap and values: ``ceil(n / 8) + v * b``;
    - as CSR with 4-byte indices, the first dimension as rows (one row for vectors and
      scalars): ``v * b + 4 * v + 4 * (rows + 1)``.

    In both sparse formats, a tensor that would not become smaller stays dense.

    Attributes:
        parameters: Number of parameters, biases and normalisation layers included.
        zeros: Number of those that are exactly zero.
        dense_bytes: Bytes of all parameters, dense.
        bitmap_bytes: Bytes as bitmap and values.
        csr_bytes: Bytes as CSR.
    """

    parameters: int
    zeros: int
    dense_bytes: int
    bitmap_bytes: int
    csr_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of *all* parameters that are zero (not only of the prunable weights)."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {100 * self.sparsity:.2f} % zero: "
            f"{_megabytes(self.dense_bytes)} dense, {_megabytes(self.bitmap_bytes)} as bitmap "
            f"and values, {_megabytes(self.csr_bytes)} as CSR"
        )

    def _repr_html_(self) -> str:
        rows = [["format", "size", "of dense"]]
        for name, count in (
            ("dense", self.dense_bytes),
            ("bitmap and values", self.bitmap_bytes),
            ("CSR", self.csr_bytes),
        ):
            share = f"{100 * count / self.dense_bytes:.1f} %" if self.dense_bytes else ""
            rows.append([name, _megabytes(count), share])
        caption = f"{self.parameters:,} parameters, {100 * self.sparsity:.2f} % zero"
        return html_table(rows, left=1, caption=caption)


def size(model: nn.Module) -> ModelSize:
    """Measure the size of a model's parameters, dense and in two sparse formats.

    Tied parameters count once; buffers do not count. The function is meant for plain models. Of a
    weight under a parametrization or a pruning mask, the value that the forward pass uses is
    counted, and parameters of the parametrization, such as thresholds, are counted too.

    Example:
        >>> layer = torch.nn.Linear(500, 500, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight)
        >>> print(size(layer))
        250,000 parameters, 99.80 % zero:
        1.000 MB dense, 0.033 MB as bitmap and values, 0.006 MB as CSR
    """
    parameters = zeros = dense = bitmap = csr = 0
    for tensor in _weights(model):
        count, empty, item = tensor.numel(), _zeros(tensor), tensor.element_size()
        rows = tensor.shape[0] if tensor.ndim > 1 else 1
        values = (count - empty) * item
        parameters += count
        zeros += empty
        dense += count * item
        bitmap += min(count * item, -(-count // 8) + values)
        csr += min(count * item, values + 4 * (count - empty) + 4 * (rows + 1))
    return ModelSize(parameters, zeros, dense, bitmap, csr)


def _is_prunable(module: nn.Module, name: str) -> bool:
    return name in prunable_by_default(module)


def _weights(
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
            with torch.no_grad():
                tensor = getattr(module, name)
                if mask is not None:  # the attribute is outdated until the next forward pass
                    tensor = tensor * mask
            yield tensor


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor.detach()))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3f} MB"
