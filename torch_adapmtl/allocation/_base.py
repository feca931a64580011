"""What an allocation is: settings that make an allocator, which moves the layers' offsets."""

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
    """Says at every update how far the layers' offsets should move.

    Attributes:
        synchronize: Whether processes that train together add up what they see.
    """

    synchronize = True

    @abstractmethod
    def moves(
        self, sample: Sample, magnitudes: Scores, thresholds: Tensor, offsets: Tensor, zeros: float
    ) -> Tensor:
        """Say how far each layer's offset should move.

        Args:
            sample: The magnitudes of the sampled weights, in storage order.
            magnitudes: The same, sorted within each layer.
            thresholds: The threshold of each layer, (L,).
            offsets: The offset of each layer, (L,).
            zeros: How many weights the schedule asks to be zero.

        Returns:
            The moves in units of log alpha, (L,); equal within a pool.
        """

    def listen(self, listening: bool) -> None:
        """Look at the gradients of the backward passes from now on, or stop doing so."""

    def stop(self) -> None:
        """Remove hooks from the parameters."""


class Allocation(ABC):
    """How the zeros are shared out between layers: what moves their offsets.

    A layer's threshold is the common level times `exp(offset)`. Subclasses are frozen dataclasses.

    Attributes:
        bound: Largest offset, in units of log alpha.
        trained: Whether the optimiser trains the offsets.
        shardable: Whether it works on weights of which each process holds a part (`fully_shard`).
    """

    bound: float
    trained: ClassVar[bool] = False
    shardable: ClassVar[bool] = False

    @abstractmethod
    def allocator(self, layers: Layers, offsets: Pooled) -> Allocator | None:
        """Make what moves the offsets at an update; None if nothing does."""


@dataclass(frozen=True)
class CommonAllocation(Allocation):
    """One threshold for all layers: the offsets stay 0."""

    shardable: ClassVar[bool] = True

    bound: float = 0.0

    def allocator(self, layers: Layers, offsets: Pooled) -> None:
        """Return None: nothing moves the offsets."""
