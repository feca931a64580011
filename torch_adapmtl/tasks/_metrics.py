"""Two metrics that torchmetrics lacks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Mean", "MedianAngle"]


class Mean(Metric):
    """A mean over all batches.

    Unlike `torchmetrics.MeanMetric` it keeps NaNs, so it does not read values to look for them.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Add values, or the sum of weighted values and the sum of their weights."""
        self.total += values.sum()
        self.weight += values.numel() if weight is None else weight

    def compute(self) -> Tensor:
        """The mean; NaN if no value was added."""
        return self.total / self.weight


class MedianAngle(Metric):
    """The median of angles in degrees, from a histogram: constant memory, on the device."""

    counts: Tensor
    _BIN = 0.01

    def __init__(self) -> None:
        super().__init__()
        bins = round(180 / self._BIN) + 1
        self.add_state("counts", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, angle: Tensor) -> None:
        """Count the angles."""
        index = (angle / self._BIN).long().clamp(0, len(self.counts) - 1)
        self.counts += torch.bincount(index.flatten(), minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The middle of the bin that holds the (lower) median; NaN if no angle was added."""
        cumulative = self.counts.cumsum(0)
        rank = torch.div(cumulative[-1] + 1, 2, rounding_mode="floor")
        median = (torch.searchsorted(cumulative, rank) + 0.5) * self._BIN
        return torch.where(cumulative[-1] > 0, median, torch.nan)
