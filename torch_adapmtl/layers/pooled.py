"""One number for each pool of layers that share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_adapmtl._precision import KeepsPrecision

__all__ = ["Pooled"]


class Pooled(KeepsPrecision):
    """One number for each pool of layers, in one tensor: offsets, or the paper's scores.

    Args:
        pool: For each layer the index of its pool; pools are numbered from 0 without gaps.
        value: Initial value of all pools.
        device: Where the tensor is.
        trained: Whether the optimiser trains it.

    Attributes:
        values: The numbers, float32 of shape (P,); a parameter if trained.
        pool: As given.
    """

    values: Tensor

    def __init__(
        self, pool: Sequence[int], *, value: float = 0.0, device: torch.device, trained: bool
    ) -> None:
        super().__init__()
        self.pool = list(pool)
        values = torch.full((max(pool) + 1,), float(value), device=device)
        if trained:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def of(self, layer: int) -> Tensor:
        """The number of one layer, 0-d, differentiable if it is trained."""
        return self.values[self.pool[layer]]

    def by_layer(self) -> Tensor:
        """The number of each layer, (L,), detached."""
        return self.values.detach()[self._index()]

    def assign(self, by_layer: Tensor) -> None:
        """Set the numbers from those of the layers, (L,), which are equal within a pool."""
        first = [self.pool.index(pool) for pool in range(len(self.values))]
        self.values.copy_(by_layer[torch.tensor(first, device=by_layer.device)])

    def sum(self, by_layer: Tensor) -> Tensor:
        """Replace the number of each layer, (L,), by the sum over its pool."""
        index = self._index()
        return torch.zeros_like(by_layer).index_add_(0, index, by_layer)[index]

    def _index(self) -> Tensor:
        return torch.tensor(self.pool, device=self.values.device)
