"""Allocation by layer-adaptive magnitudes (LAMP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.allocation._base import Allocation, Allocator
from torch_adapmtl.budget.solver import Scores, bisect, to_bits
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.pooled import Pooled
from torch_adapmtl.layers.sampling import Sample

__all__ = ["LAMP", "LAMPAllocation", "lamp_thresholds"]

# Squares of magnitudes are summed as integers, in units of the layer's largest square over this.
_UNIT = 2.0**40


@dataclass(frozen=True)
class LAMPAllocation(Allocation):
    r"""Offsets from layer-adaptive magnitudes (LAMP, Lee et al., arXiv 2010.07611).

    The LAMP score of a weight is its square divided by the sum of the squares of all weights in its
    layer that are at least as large. It bounds the relative change of the layer's output if the
    weight is pruned. Pruning the lowest scores of all layers, as many as the budget asks for, gives
    each layer a threshold \(\alpha_l\). The goal for the offset of a layer is `strength` times the
    deviation of \(\log \alpha_l\) from its mean over all weights. At every update the offset moves
    by the fraction `rate` of its distance to the goal.

    Args:
        strength: 1 for LAMP's thresholds, 0 for one common threshold, numbers in between for
            weighted geometric means of the two; in [0, 1].
        rate: Fraction of the distance that an update covers; in (0, 1].
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If a number is outside its range.
        TypeError: If an argument is not a number.

    Example:
        >>> from torch_adapmtl import LAMPAllocation
        >>> LAMPAllocation(strength=1.0)
        LAMPAllocation(strength=1.0, rate=0.3, bound=5.0)
    """

    shardable: ClassVar[bool] = True

    strength: float = 0.75
    rate: float = 0.3
    bound: float = 5.0

    def __post_init__(self) -> None:
        check_numbers("allocation: ", **vars(self))
        if not 0 <= self.strength <= 1:
            raise ValueError(f"allocation: strength must lie in [0, 1], got {self.strength}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"allocation: rate must lie in (0, 1], got {self.rate}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"allocation: bound must be > 0 and finite, got {self.bound}")

    def allocator(self, layers: Layers, offsets: Pooled) -> LAMP:
        """Make the allocator."""
        return LAMP(layers, offsets, self)


class LAMP(Allocator):
    """Moves the offsets as described in `LAMPAllocation`.

    Args:
        layers: The layers.
        offsets: Their offsets, one for each pool.
        settings: The settings.
    """

    def __init__(self, layers: Layers, offsets: Pooled, settings: LAMPAllocation) -> None:
        super().__init__()
        self._layers, self._settings = layers, settings
        self._pool = (offsets,)  # in a tuple, so that it is not registered as a submodule

    def moves(
        self, sample: Sample, magnitudes: Scores, thresholds: Tensor, offsets: Tensor, budget: float
    ) -> Tensor:
        """Return how far the offset of each layer moves."""
        (pool,) = self._pool
        costs = None if self._layers.counts == "weights" else self._layers.costs
        alpha = lamp_thresholds(magnitudes, budget, costs)
        known = alpha > 0  # 0 has no logarithm: nothing is pruned yet, or all weights are zero
        weight = torch.tensor(self._layers.sizes, device=offsets.device) * known
        log = alpha.masked_fill(~known, 1.0).log()
        pooled = pool.sum(log * weight) / pool.sum(weight.to(log.dtype))
        mean = (log * weight).sum() / weight.sum()
        settings = self._settings
        move = settings.rate * (settings.strength * (pooled - mean) - offsets)
        return torch.where(move.isfinite(), move, 0.0)


def lamp_thresholds(
    magnitudes: Scores, budget: float, costs: Sequence[float] | None = None
) -> Tensor:
    """Return the threshold of each layer at which what LAMP prunes meets the budget.

    Args:
        magnitudes: The magnitudes of the layers' weights, or of a sample of them.
        budget: The total cost of the weights to prune.
        costs: The cost of a weight of each layer; 1 if None.

    Returns:
        The largest magnitude that is pruned in each layer, float32 of shape (L,); 0 if none is
        pruned. Weights with equal scores are pruned together.
    """
    layer, base, weights = magnitudes.layer, magnitudes.base, magnitudes.weights
    start, end = magnitudes.starts[:-1], magnitudes.starts[1:]
    values = magnitudes.values
    largest = values[end - 1].double().clamp(min=torch.finfo(torch.float32).tiny)
    square = (values / largest[layer]).square()  # in units of the layer's largest
    # Sums of integers are exact, and do not depend on the order.
    whole = (square * _UNIT).long()
    cumulative = whole.cumsum(0)
    # The sum over this weight and all larger ones of its layer.
    larger = (cumulative[end - 1][layer] - cumulative + whole).double() / _UNIT
    score = square / (larger * weights[layer])
    score = torch.where(square > 0, score, 0.0).float()
    ranks = base[layer] | to_bits(score)

    if costs is not None:
        weights = weights * torch.tensor(costs, dtype=torch.float64, device=weights.device)

    def count(level: Tensor) -> Tensor:
        return (_rank(ranks, base, start, level.unsqueeze(-1)) * weights).sum(-1)

    wanted = torch.full((), budget, dtype=torch.float64, device=score.device)
    level = bisect(count, wanted)
    pruned = torch.where(level < 0, 0, _rank(ranks, base, start, level.clamp(min=0)))
    return torch.where(pruned > 0, values[(start + pruned - 1).clamp(min=0)], 0.0)


def _rank(keys: Tensor, base: Tensor, start: Tensor, level: Tensor) -> Tensor:
    """Count the keys of each layer up to `level` (..., 1): (..., L)."""
    return torch.searchsorted(keys, base + level, right=True) - start
