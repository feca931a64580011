"""What the adaptive controller asks of whatever decides where the zeros go."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.layers.sampling import Sample

__all__ = ["Allocator"]


class Allocator(KeepsPrecision, ABC):
    """Says at every update how far the layers' offsets should move."""

    @abstractmethod
    def moves(self, sample: Sample, thresholds: Tensor, offsets: Tensor, zeros: float) -> Tensor:
        """Say how far each layer's offset should move.

        Args:
            sample: The magnitudes of the sampled weights.
            thresholds: The threshold of each layer, (L,).
            offsets: The offset of each layer, (L,).
            zeros: How many weights the schedule asks to be zero.

        Returns:
            The moves in units of log alpha, (L,); the same within a pool.
        """

    def listen(self, listening: bool) -> None:
        """Look at the gradients of the backward passes from now on, or stop to."""

    def stop(self) -> None:
        """Leave nothing behind on the parameters."""
