"""The base classes: an `Allocation` holds settings, its `Allocator` moves the offsets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.budget.solver import Scores
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.pooled import Pooled
from torch_adapmtl.layers.sampling import Sample

__all__ = ["Allocation", "Allocator", "CommonAllocation"]


class Allocator(KeepsPrecision, ABC):
    """Computes at every update how far the offsets of the layers move.

    Attributes:
        synchronize: Whether processes that train together sum their statistics.
    """

    synchronize = True

    @abstractmethod
    def moves(
        self, sample: Sample, magnitudes: Scores, thresholds: Tensor, offsets: Tensor, budget: float
    ) -> Tensor:
        """Return how far the offset of each layer moves.

        Args:
            sample: The magnitudes of the sampled weights, in storage order.
            magnitudes: The same magnitudes, sorted within each layer.
            thresholds: The threshold of each layer, (L,).
            offsets: The offset of each layer, (L,).
            budget: What the schedule asks to be pruned: a number of zeros, or of multiply-adds.

        Returns:
            The moves in units of log alpha, (L,); equal within a pool.
        """

    def listen(self, listening: bool) -> None:
        """Start or stop collecting gradients in backward passes; nothing by default."""

    def stop(self) -> None:
        """Remove the hooks from the parameters; nothing by default."""


class Allocation(ABC):
    """How the zeros are distributed over the layers, by moving their offsets.

    A layer's threshold is the common level times `exp(offset)`. Subclasses are frozen dataclasses.

    Attributes:
        bound: Largest offset, in units of log alpha.
        trained: Whether the optimiser trains the offsets.
        shardable: Whether the allocation works on sharded weights (`fully_shard`).
    """

    bound: float
    trained: ClassVar[bool] = False
    shardable: ClassVar[bool] = False

    @abstractmethod
    def allocator(self, layers: Layers, offsets: Pooled) -> Allocator | None:
        """Make the allocator, or return None if no allocator moves the offsets."""


@dataclass(frozen=True)
class CommonAllocation(Allocation):
    """One threshold for all layers: the offsets stay 0."""

    shardable: ClassVar[bool] = True

    bound: float = 0.0

    def allocator(self, layers: Layers, offsets: Pooled) -> None:
        """Return None, because the offsets do not move."""
