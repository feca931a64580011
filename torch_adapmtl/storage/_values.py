"""Values in fewer bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16, torch.int8)


class Narrowing:
    """The values of a tensor in fewer bits, a few at a time.

    Integers lie between -127 and 127, and one of the two stands for the value of a row (along the
    first dimension) that is largest in magnitude.

    Args:
        x: The tensor, of two dimensions or more.
        dtype: The type of the values.

    Attributes:
        scales: The scale of each row, if the values are integers.

    Raises:
        ValueError: If a value is not finite, or too large or too small for the type.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self._x, self._dtype = x, dtype
        self._row = x[0].numel()
        self._squares, self._lost = 0.0, 0.0
        rows = x.flatten(1)
        low, high = rows.amin(1).double(), rows.amax(1).double()
        largest = torch.maximum(-low, high).cpu()
        if not bool(largest.isfinite().all()):
            raise ValueError("holds values that are not finite")
        self.scales: Tensor | None = None
        if dtype is torch.int8:
            self.scales = (largest / 127).float()
            if not bool(self.scales.isfinite().all()):
                raise ValueError(f"holds values that are too large for {dtype}")
            if bool((self.scales[largest > 0] == 0).any()):
                raise ValueError(f"holds values that are too small for {dtype}")
            self.scales[largest == 0] = 1
        elif float(largest.max()) > torch.finfo(dtype).max:
            raise ValueError(f"holds values that are too large for {dtype}")

    def narrow(self, part: Tensor, first: int) -> Tensor:
        """Values in fewer bits, of which the first is element `first` of the tensor."""
        scales = spread(self.scales, first, len(part), self._row)
        if scales is None:
            values = part.to(self._dtype)
        else:
            values = (part / scales).round_().clamp_(-127, 127).to(self._dtype)
        difference = widened(values, scales, part.dtype).sub_(part)
        self._lost += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        self._squares += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        return values

    @property
    def error(self) -> float:
        """The norm of what was lost so far, as a share of the norm.

        Raises:
            ValueError: If all was lost.
        """
        share = math.sqrt(self._lost / self._squares) if self._squares else 0.0
        if not share < 1:
            raise ValueError(f"holds values that are too small for {self._dtype}")
        return share


def spread(scales: Tensor | None, first: int, count: int, row: int) -> Tensor | None:
    """The scale of each of some elements; None if there are no scales.

    Args:
        scales: The scale of each row.
        first: The first of the elements.
        count: Their number.
        row: Number of elements in a row.
    """
    return None if scales is None else scales[torch.arange(first, first + count) // row]


def widened(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in more bits, with a scale for each."""
    return values.to(dtype) if scales is None else (values * scales).to(dtype)
