"""Offsets that the optimiser trains with the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.allocation._base import Allocation
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.pooled import Pooled

__all__ = ["GradientAllocation"]


@dataclass(frozen=True)
class GradientAllocation(Allocation):
    """Offsets trained by the task gradient through the thresholds, as the paper trains thresholds.

    The budget still holds the overall sparsity; the gradient decides which layers bear it. Make
    the optimiser from [`Pruner.param_groups`][torch_adapmtl.Pruner.param_groups], which include
    the offsets.

    Args:
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If `bound` is not positive.
        TypeError: If it is no number.

    Example:
        >>> from torch_adapmtl import GradientAllocation
        >>> GradientAllocation()
        GradientAllocation(bound=2.3)
    """

    trained: ClassVar[bool] = True

    bound: float = 2.3

    def __post_init__(self) -> None:
        check_numbers("allocation: ", bound=self.bound)
        if not 0 < self.bound < math.inf:
            raise ValueError(f"allocation: bound must be > 0 and finite, got {self.bound}")

    def allocator(self, layers: Layers, offsets: Pooled) -> None:
        """Return None: the optimiser moves the offsets."""
