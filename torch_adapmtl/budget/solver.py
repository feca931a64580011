"""The solver of the sparsity budget: it finds the level at which the zeros of the model meet it.

The *score* of a weight is `|w| / exp(offset)`, with the offset of its layer. Weights with scores up
to a common level are pruned, and the solver finds the level that meets the budget. Each zero of a
layer counts as much as its *cost*: 1 in a budget of zeros, the number of multiply-adds that a
weight takes part in for a budget of multiply-adds. The solver works on the
bits of the scores as integers, because the bits of non-negative float32 numbers have the same order
as the numbers. So the search is exact after a few rounds, and never waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "Bounds", "Scores", "bisect", "from_bits", "select", "solve", "to_bits"]

# A level is the bits of a float32 plus one. Level 0 stands for negative scores, which mark fixed
# zeros. The last level stands for the largest finite number and for everything that is not finite.
MAX_BITS = 0x7F7FFFFF + 1
# 16 ** 8 exceeds the number of levels; a round more for the remainders.
_WAYS, _ROUNDS = 16, 9


@dataclass(frozen=True)
class Bounds:
    """The limits of layers and components, and the costs of their zeros, in float64.

    Attributes:
        component: The index of each layer's component, shape (L,).
        layer_max: Largest number of zeros of each layer, shape (L,).
        least: Smallest total cost of the zeros of each component, shape (C,).
        most: Largest total cost of the zeros of each component, shape (C,).
        costs: The cost of a zero of each layer, shape (L,); 1 if None.
    """

    component: Tensor
    layer_max: Tensor
    least: Tensor
    most: Tensor
    costs: Tensor | None = None

    def total(self, counts: Tensor) -> Tensor:
        """Clamp `counts` (..., L) to the bounds of the layers; sum their costs (..., C)."""
        capped = torch.minimum(counts, self.layer_max)
        if self.costs is not None:
            capped = capped * self.costs
        costs = self.least.new_zeros(*counts.shape[:-1], len(self.least))
        return costs.index_add_(-1, self.component, capped)

    def clamp(self, costs: Tensor) -> Tensor:
        """Clamp the total costs of the components (..., C) to their bounds."""
        return costs.clamp(self.least, self.most)


class Scores:
    """Scores of all layers, or of a sample of them, sorted within each layer.

    Args:
        values: The scores, concatenated over the layers, flat, float32; negative for fixed zeros.
        lengths: The number of scores of each layer.
        weights: How many weights of its layer each score represents, by layer, float64 of shape
            (L,); 1 if None.
        below: How many further weights of each layer have scores below all of `values`, int64 of
            shape (L,); 0 if None.

    Attributes:
        keys: The layer's index in the high word and the score's bits in the low word, sorted,
            int64.
        layer: The index of the layer of each key, int64.
        starts: The position of each layer's first key, then the number of keys, (L + 1,).
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
        # A single sort orders the scores of every layer.
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
        """The scores in the order of the keys, float32; 0 for fixed zeros."""
        return from_bits(self.bits)

    def scaled(self, factors: Tensor) -> Scores:
        """Multiply the scores by a positive factor for each layer, (L,); needs no new sort."""
        bits = to_bits(self.values * factors[self.layer]).masked_fill_(self.bits == 0, 0)
        scores = copy.copy(self)
        del scores.values  # the cached values belong to this object
        scores.keys = self.base[self.layer] | bits
        return scores

    def count(self, level: Tensor) -> Tensor:
        """Count the weights of each layer with scores up to `level` (bits, (..., L)): (..., L)."""
        rank = self._rank(level, right=True)
        return torch.where(level < 0, 0, rank + self.below) * self.weights

    def _rank(self, level: Tensor, right: bool = False) -> Tensor:
        """Count the scores of each layer below `level`, or up to it if `right`: (..., L)."""
        keys = self.base + level.clamp(min=0)
        return torch.searchsorted(self.keys, keys, right=right) - self.starts[:-1]

    def window(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """A range of levels for each layer that contains the exact level, if the sample is fair."""
        starts, length = self.starts[:-1], self.starts.diff()
        rank = self._rank(level)
        # Eight standard deviations of the rank, and a constant because they vanish at the ends.
        margin = 8.0 * (rank * (length - rank) / length.double()).clamp(min=0).sqrt() + 16.0
        margin = margin.nan_to_num(0.0).long()
        low, high = rank - margin, rank + margin
        last, bits = len(self.keys) - 1, self.bits
        lowest = torch.where(low <= 0, -1, bits[(starts + low).clamp(0, last)])
        highest = torch.where(high >= length, MAX_BITS, bits[(starts + high).clamp(0, last)])
        return lowest, highest


def bisect(count: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Find the smallest level, in bits, whose count is at least `wanted`; -1 prunes nothing.

    Args:
        count: A function of levels of shape (W, *wanted.shape), which returns counts in that shape.
            They do not fall if the level rises.
        wanted: The counts to reach.
    """
    low = torch.full_like(wanted, -2, dtype=torch.long)
    high = torch.full_like(wanted, MAX_BITS, dtype=torch.long)
    # Each round looks at the levels between _WAYS equal intervals: few rounds, of few operations.
    way = torch.arange(1, _WAYS, device=wanted.device).view(-1, *[1] * wanted.ndim)
    for _ in range(_ROUNDS):
        width = high - low
        levels = low + torch.div(width * way, _WAYS, rounding_mode="floor")
        lower = (count(levels) < wanted).sum(0)  # how many of these levels are too low
        high = torch.minimum(
            high, low + torch.div(width * (lower + 1), _WAYS, rounding_mode="floor")
        )
        low = low + torch.div(width * lower, _WAYS, rounding_mode="floor")
    return high.clamp(min=-1)


def _common(scores: Scores, bounds: Bounds, budget: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """Find the common level (0-d) at which the components, within their bounds, meet the budget.

    Also returns the function that sums the costs of the components (..., C) at levels of the
    components (..., C). It respects the bounds of the layers, but not those of the components.
    """

    def at(level: Tensor) -> Tensor:
        return bounds.total(scores.count(level[..., bounds.component]))

    def overall(level: Tensor) -> Tensor:
        counts = scores.count(level.unsqueeze(-1).expand(*level.shape, len(bounds.component)))
        return bounds.clamp(bounds.total(counts)).sum(-1)

    return bisect(overall, budget), at


def solve(scores: Scores, bounds: Bounds, budget: Tensor) -> Tensor:
    """Find the level of each layer, in bits, at which the zeros of the model meet the budget.

    All layers share one level, except where the bound of a layer or a component applies. If scores
    are equal or only a sample is known, the budget is met approximately; `select` meets it
    exactly. Nothing here waits for the device.

    Args:
        scores: The scores to count.
        bounds: The bounds and costs.
        budget: The total cost of all zeros, a 0-d float64 tensor.

    Returns:
        The levels, int64 of shape (L,); `from_bits` turns them into thresholds on the scores.
    """
    common, at = _common(scores, bounds, budget)
    unbounded = at(common.expand_as(bounds.least))
    bounded = bounds.clamp(unbounded)
    level = torch.where(unbounded != bounded, bisect(at, bounded), common)[bounds.component]
    cap = bisect(scores.count, bounds.layer_max)
    # Equal scores that together would exceed the bound of a layer are not pruned at all.
    cap = torch.where(scores.count(cap) > bounds.layer_max, cap - 1, cap)
    return torch.minimum(level, cap)


def select(scores: Scores, bounds: Bounds, budget: float) -> tuple[list[int], list[int]]:
    """Find exactly which weights to prune: a level in bits and a number of zeros for each layer.

    In a layer with level b and number k, all weights with scores below b are pruned. Of the weights
    whose scores equal b, the first in storage order are pruned, until k weights are pruned. Equal
    scores in several components or layers are pruned in the first of them.

    If all costs are 1, the numbers sum to `budget`, an integer. Otherwise their total cost differs
    from it by at most half of the largest cost, and a bound of a component can be exceeded by at
    most the largest cost.

    Args:
        scores: The scores of all weights, or of all weights near the resulting levels.
        bounds: The bounds and costs.
        budget: The total cost of all zeros.

    Returns:
        The levels in bits and the numbers of zeros, one of each for each layer.
    """
    device = scores.keys.device
    common, at = _common(scores, bounds, torch.tensor(budget, dtype=torch.float64, device=device))
    common = common.expand_as(bounds.least)
    below, upto = at(common - 1), at(common)
    by_component = bounds.clamp(below).tolist()
    missing = budget - sum(by_component)
    for c, most in enumerate(bounds.clamp(upto).tolist()):
        extra = min(missing, most - by_component[c])
        by_component[c] += extra
        missing -= extra

    wanted = torch.tensor(by_component, dtype=torch.float64, device=device)
    bounded = (wanted < below) | (wanted > upto)  # components whose bounds apply
    component_level = torch.where(bounded, bisect(at, wanted), common)[bounds.component]
    level = torch.minimum(component_level, bisect(scores.count, bounds.layer_max))
    upto = torch.minimum(scores.count(component_level), bounds.layer_max)
    below = torch.minimum(scores.count(component_level - 1), bounds.layer_max)
    numbers, room = below.tolist(), (upto - below).tolist()
    costs = [1.0] * len(numbers) if bounds.costs is None else bounds.costs.tolist()
    missing = 0.0
    for c, cost in enumerate(by_component):
        members = (bounds.component == c).nonzero().squeeze(1).tolist()
        # What one component misses or exceeds by a part of a weight goes to the next.
        missing += cost - sum(numbers[i] * costs[i] for i in members)
        for i in members:
            extra = max(0, min(round(missing / costs[i]), room[i]))
            numbers[i] += extra
            missing -= extra * costs[i]
    return level.tolist(), [int(k) for k in numbers]


def to_bits(scores: Tensor) -> Tensor:
    """Bits of float32 scores as int64, in the order of the scores; 0 for all negative scores."""
    return (scores.view(torch.int32).long() + 1).clamp(0, MAX_BITS)


def from_bits(level: Tensor) -> Tensor:
    """The float32 numbers with these bits; 0 for the levels -1 and 0."""
    return (level - 1).clamp(min=0).to(torch.int32).view(torch.float32)
