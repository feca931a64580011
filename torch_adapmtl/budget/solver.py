"""The solver of the sparsity budget: which level of the scores makes so many weights zero.

A weight's *score* is `|w| / exp(offset)` with the offset of its layer; one level for the whole
model decides: scores up to the level are pruned. The solver finds the level that meets the
budget. It works on integers, because the bits of non-negative float32 numbers are ordered as the
numbers are: bisection over them is exact and ends after 31 halvings, without a host round trip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "Bounds", "Scores", "bisect", "from_bits", "select", "solve", "to_bits"]

# Bits are those of a float32, plus one: 0 is a weight that is zero in any case (its score is
# negative), the last stands for the largest finite number and for all that is not finite.
MAX_BITS = 0x7F7FFFFF + 1


@dataclass(frozen=True)
class Bounds:
    """How many zeros each layer and each component may and must have; counts in float64.

    Attributes:
        component: For each layer the index of its component, shape (L,).
        layer_max: Most zeros a layer may have, shape (L,).
        min_zeros: Fewest zeros a component must have, shape (C,).
        max_zeros: Most zeros a component may have, shape (C,).
    """

    component: Tensor
    layer_max: Tensor
    min_zeros: Tensor
    max_zeros: Tensor

    def total(self, counts: Tensor) -> Tensor:
        """Sum `counts` (L,), each held to its layer's bound, by component (C,)."""
        capped = torch.minimum(counts, self.layer_max)
        zeros = torch.zeros_like(self.min_zeros)
        return zeros.index_add_(0, self.component, capped)

    def clamp(self, zeros: Tensor) -> Tensor:
        """Hold the components' numbers of zeros (C,) within their bounds."""
        return zeros.clamp(self.min_zeros, self.max_zeros)


class Scores:
    """Scores of all layers, or of a sample of them, sorted within each layer.

    Args:
        values: The scores of all layers one after the other, flat, float32; negative for weights
            that are zero in any case.
        lengths: How many of them belong to each layer.
        weights: How many weights of its layer each score stands for, by layer, float64 of shape
            (L,); None for one.
        below: For each layer how many of its weights are known to score below all those given,
            int64 of shape (L,); none if None.

    Attributes:
        keys: Index of the layer in the high word, bits of the score in the low one, sorted, int64.
        layer: The index of the layer of each key, int64.
        starts: Where the keys of each layer start, and where those of the last one end, (L + 1,).
    """

    def __init__(
        self,
        values: Tensor,
        lengths: Sequence[int],
        weights: Tensor | None = None,
        below: Tensor | None = None,
    ) -> None:
        index = torch.arange(len(lengths), device=values.device)
        length = torch.tensor(lengths, device=values.device)
        self.base = index << 32
        self.layer = torch.repeat_interleave(index, length, output_size=len(values))
        # One sort orders every layer's scores.
        self.keys = (self.base[self.layer] | to_bits(values)).sort().values
        ends = length.cumsum(0)
        self.starts = torch.cat([ends.new_zeros(1), ends])
        self.below = torch.zeros_like(length) if below is None else below
        self.weights = torch.ones_like(length, dtype=torch.float64) if weights is None else weights

    @property
    def bits(self) -> Tensor:
        """The bits of the scores, in the order of the keys."""
        return self.keys & 0xFFFFFFFF

    @cached_property
    def values(self) -> Tensor:
        """The scores in the order of the keys, float32; 0 for weights that are zero in any case."""
        return from_bits(self.bits)

    def scaled(self, factors: Tensor) -> Scores:
        """The same scores, multiplied by a positive factor for each layer, (L,), without a sort."""
        bits = to_bits(self.values * factors[self.layer]).masked_fill_(self.bits == 0, 0)
        scores = copy.copy(self)
        del scores.values  # those of this object
        scores.keys = self.base[self.layer] | bits
        return scores

    def count(self, level: Tensor) -> Tensor:
        """How many weights of each layer have scores up to `level` (bits, (L,) or 0-d): (L,)."""
        rank = self._rank(level, right=True)
        return torch.where(level < 0, 0, rank + self.below) * self.weights

    def _rank(self, level: Tensor, right: bool = False) -> Tensor:
        """How many of each layer's scores are below `level`, or up to it: (L,)."""
        keys = self.base + level.clamp(min=0)
        return torch.searchsorted(self.keys, keys, right=right) - self.starts[:-1]

    def window(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """For each layer the range of levels that holds the exact one, if this is a fair sample."""
        starts, length = self.starts[:-1], self.starts.diff()
        rank = self._rank(level)
        # Eight standard deviations of the rank, and more where they say little.
        margin = 8.0 * (rank * (length - rank) / length.double()).clamp(min=0).sqrt() + 16.0
        margin = margin.nan_to_num(0.0).long()
        low, high = rank - margin, rank + margin
        last, bits = len(self.keys) - 1, self.bits
        lowest = torch.where(low <= 0, -1, bits[(starts + low).clamp(0, last)])
        highest = torch.where(high >= length, MAX_BITS, bits[(starts + high).clamp(0, last)])
        return lowest, highest


def bisect(count: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """The smallest level in bits whose count reaches `wanted`; -1 prunes nothing."""
    low = torch.full_like(wanted, -2, dtype=torch.long)
    high = torch.full_like(wanted, MAX_BITS, dtype=torch.long)
    for _ in range(32):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        enough = count(middle) >= wanted
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high.clamp(min=-1)


def _common(scores: Scores, bounds: Bounds, zeros: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """The level (0-d) at which the bounded components hold `zeros`; how to count them at a level.

    The second takes a level for the model (0-d) or one for each component (C,), and gives counts
    (C,) that the layers' bounds hold already and the components' do not yet.
    """
    member = bounds.component

    def at(level: Tensor) -> Tensor:
        spread = level[member] if level.ndim else level.expand(len(member))
        return bounds.total(scores.count(spread))

    return bisect(lambda lv: bounds.clamp(at(lv)).sum(), zeros), at


def solve(scores: Scores, bounds: Bounds, zeros: Tensor) -> Tensor:
    """Find the level of each layer, in bits, at which the model has `zeros` zero weights.

    All layers share one level, except those that a bound holds back (the layer's own bound, or its
    component's). Where scores tie, or the scores are a sample, the count is met as nearly as a
    level can; `select` meets it exactly. Nothing here waits for the device.

    Args:
        scores: The scores to count.
        bounds: Bounds in numbers of zeros.
        zeros: The budget, a 0-d float64 tensor.

    Returns:
        The levels, int64 of shape (L,); `from_bits` turns them into thresholds on the scores.
    """
    common, at = _common(scores, bounds, zeros)
    free = at(common)
    due = bounds.clamp(free)
    level = torch.where(free != due, bisect(at, due), common)[bounds.component]
    cap = bisect(scores.count, bounds.layer_max)
    # A tie that would carry a layer past its bound is not pruned at all.
    cap = torch.where(scores.count(cap) > bounds.layer_max, cap - 1, cap)
    return torch.minimum(level, cap)


def select(scores: Scores, bounds: Bounds, zeros: int) -> tuple[list[int], list[int]]:
    """Say exactly which weights are pruned: per layer a level in bits and a number of zeros.

    A layer with level b and number k loses all its weights with scores below b and, of those that
    tie at b, the first ones in storage order until k are gone. Between components and between
    layers, ties go to the first. The numbers sum to `zeros`.

    Args:
        scores: The scores of all weights, or of all those near the levels that come out.
        bounds: Bounds in numbers of zeros.
        zeros: The budget.

    Returns:
        Levels in bits and numbers of zeros, one a layer.
    """
    budget = torch.tensor(zeros, dtype=torch.float64, device=scores.keys.device)
    common, at = _common(scores, bounds, budget)
    below, upto = at(common - 1), at(common)
    due = bounds.clamp(below).tolist()
    _fill(due, bounds.clamp(upto).tolist(), range(len(due)), zeros)

    wanted = torch.tensor(due, dtype=torch.float64, device=budget.device)
    held = (wanted < below) | (wanted > upto)
    own = torch.where(held, bisect(at, wanted), common)[bounds.component]
    level = torch.minimum(own, bisect(scores.count, bounds.layer_max))
    most = torch.minimum(scores.count(own), bounds.layer_max).tolist()
    numbers = torch.minimum(scores.count(own - 1), bounds.layer_max).tolist()
    for c, number in enumerate(due):
        members = (bounds.component == c).nonzero().squeeze(1).tolist()
        _fill(numbers, most, members, number)
    return level.tolist(), [int(k) for k in numbers]


def _fill(numbers: list[float], most: list[float], order: Sequence[int], wanted: float) -> None:
    """Raise the `numbers` in `order` toward `most`, first come first served, to sum to `wanted`."""
    missing = wanted - sum(numbers[i] for i in order)
    for i in order:
        extra = min(missing, most[i] - numbers[i])
        numbers[i] += extra
        missing -= extra


def to_bits(scores: Tensor) -> Tensor:
    """Bits of float32 scores as int64, ordered as the scores are; negative ones are all alike."""
    return (scores.view(torch.int32).long() + 1).clamp(0, MAX_BITS)


def from_bits(level: Tensor) -> Tensor:
    """The float32 numbers with these bits; 0 for the levels that prune nothing new."""
    return (level - 1).clamp(min=0).to(torch.int32).view(torch.float32)
