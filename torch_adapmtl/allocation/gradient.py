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
    """Offsets trained by the gradient of the loss, in the way in which the paper trains thresholds.

    The level still meets the budget; the gradient decides how the zeros are distributed over the
    layers. Make the optimiser from [`Pruner.param_groups`][torch_adapmtl.Pruner.param_groups],
    which includes the offsets.

    Args:
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If `bound` is not positive and finite.
        TypeError: If `bound` is not a number.

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
        """Return None, because the optimiser moves the offsets."""
