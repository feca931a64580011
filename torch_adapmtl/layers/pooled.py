"""One number for each pool of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["Pooled", "PooledThreshold"]


class Pooled(KeepsPrecision):
    """One number for each pool of layers that share it: an offset, or the paper's s.

    Args:
        pool: The index of each layer's pool; pools are numbered from 0 without gaps.
        value: Initial value of all numbers.
        device: The device of the tensor.
        trained: Whether the optimiser trains the numbers.

    Attributes:
        values: The numbers of the P pools, float32 of shape (P,); a parameter if trained.
        pool: The index of each layer's pool.
    """

    values: Tensor

    def __init__(
        self, pool: Sequence[int], *, value: float = 0.0, device: torch.device, trained: bool
    ) -> None:
        super().__init__()
        self.pool = list(pool)
        # Not a buffer: `model.buffers()` would contain it if the numbers are trained.
        self._on_device = torch.tensor(self.pool, device=device)
        values = torch.full((max(pool) + 1,), float(value), device=device)
        if trained:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def of(self, layer: int) -> Tensor:
        """Return the number of one layer, 0-d, differentiable if it is trained."""
        return self.values[self.pool[layer]]

    def by_layer(self) -> Tensor:
        """Return the number of each layer, (L,), detached."""
        return self.values.detach()[self._index()]

    def assign(self, by_layer: Tensor) -> None:
        """Set the numbers from one value for each layer, (L,), equal within a pool."""
        first = [self.pool.index(pool) for pool in range(len(self.values))]
        self.values.copy_(by_layer[torch.tensor(first, device=by_layer.device)])

    def sum(self, by_layer: Tensor) -> Tensor:
        """Return for each layer the sum of the values of its pool, (L,)."""
        index = self._index()
        return torch.zeros_like(by_layer).index_add_(0, index, by_layer)[index]

    def _index(self) -> Tensor:
        """`pool` as a tensor; copying it to the device each time would wait for the device."""
        if self._on_device.device != self.values.device:
            self._on_device = self._on_device.to(self.values.device)
        return self._on_device


class PooledThreshold(SoftThreshold):
    """A threshold that subclasses compute from the number of a layer's pool, in `threshold`.

    Args:
        numbers: The numbers.
        layer: The index of the layer.
        value: The value of `alpha`.
        **options: Options of `SoftThreshold`.
    """

    def __init__(self, numbers: Pooled, layer: int, value: float = 0.0, **options: Any) -> None:
        super().__init__(value, **options)
        self._source = (numbers, layer)  # in a tuple, so that it is not registered as a submodule

    @property
    def number(self) -> Tensor:
        """The number of the layer's pool, 0-d."""
        numbers, layer = self._source
        return numbers.of(layer)

    def _value(self) -> float | None:
        value = super()._value()
        return value if value == 0.0 else None
