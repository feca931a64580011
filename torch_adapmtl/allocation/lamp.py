"""Layer-adaptive magnitudes (LAMP): each layer's offset follows the weights that it has left."""

from __future__ import annotations

import math
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

# Squares of magnitudes are summed in units of the largest in their layer over this.
_UNIT = 2.0**40


@dataclass(frozen=True)
class LAMPAllocation(Allocation):
    r"""Offsets from layer-adaptive magnitudes: pruning costs every layer's output the same share.

    The score of a weight is its square over the sum of the squares of the weights of its layer
    that are no smaller (LAMP, Lee et al., arXiv 2010.07611); it bounds the change of the layer's
    output when the weight is pruned. Pruning the weights with the lowest scores of all layers, as
    many as the budget asks for, gives each layer a threshold \(\alpha_l\). At every update the
    offset of a layer moves by `rate` of its way to `strength` times the deviation of
    \(\log \alpha_l\) from the mean over all weights.

    Args:
        strength: 1 for LAMP's thresholds, 0 for one common threshold, in between for their
            weighted geometric means; in [0, 1].
        rate: Share of the way that an update goes; in (0, 1].
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If a number is outside its range.
        TypeError: If one is no number.

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
        """Make what moves the offsets."""
        return LAMP(layers, offsets, self)


class LAMP(Allocator):
    """Moves the offsets as `LAMPAllocation` says.

    Args:
        layers: The layers.
        offsets: Their offsets, by pool.
        settings: The settings.
    """

    def __init__(self, layers: Layers, offsets: Pooled, settings: LAMPAllocation) -> None:
        super().__init__()
        self._layers, self._settings = layers, settings
        self._pool = (offsets,)  # in a tuple: not a submodule of its own

    def moves(
        self, sample: Sample, magnitudes: Scores, thresholds: Tensor, offsets: Tensor, zeros: float
    ) -> Tensor:
        """Say how far each layer's offset should move."""
        (pool,) = self._pool
        alpha = lamp_thresholds(magnitudes, zeros)
        known = alpha > 0  # else there is no logarithm: nothing pruned yet, or all weights zero
        weight = torch.tensor(self._layers.sizes, device=offsets.device) * known
        log = alpha.masked_fill(~known, 1.0).log()
        pooled = pool.sum(log * weight) / pool.sum(weight.to(log.dtype))
        mean = (log * weight).sum() / weight.sum()
        settings = self._settings
        move = settings.rate * (settings.strength * (pooled - mean) - offsets)
        return torch.where(move.isfinite(), move, 0.0)


def lamp_thresholds(magnitudes: Scores, zeros: float) -> Tensor:
    """The threshold of each layer at which LAMP prunes `zeros` weights in all.

    Args:
        magnitudes: The magnitudes of the layers' weights, or of a sample of them.
        zeros: How many weights to prune.

    Returns:
        The largest magnitude that is pruned in each layer, float32 of shape (L,); 0 where none is.
        Weights whose scores tie are pruned together.
    """
    layer, base, weights = magnitudes.layer, magnitudes.base, magnitudes.weights
    start, end = magnitudes.starts[:-1], magnitudes.starts[1:]
    values = magnitudes.values
    largest = values[end - 1].double().clamp(min=torch.finfo(torch.float32).tiny)
    square = (values / largest[layer]).square()  # in units of the layer's largest
    # Whole numbers: sums of them are exact, and the same in any order.
    whole = (square * _UNIT).long()
    cumulative = whole.cumsum(0)
    # The sum over the weights from this one on in its layer, itself included.
    rest = (cumulative[end - 1][layer] - cumulative + whole).double() / _UNIT
    score = square / (rest * weights[layer])
    score = torch.where(square > 0, score, 0.0).float()
    ranks = base[layer] | to_bits(score)

    def count(level: Tensor) -> Tensor:
        return (_rank(ranks, base, start, level) * weights).sum()

    wanted = torch.full((), zeros, dtype=torch.float64, device=score.device)
    level = bisect(count, wanted)
    pruned = torch.where(level < 0, 0, _rank(ranks, base, start, level.clamp(min=0)))
    return torch.where(pruned > 0, values[(start + pruned - 1).clamp(min=0)], 0.0)


def _rank(keys: Tensor, base: Tensor, start: Tensor, level: Tensor) -> Tensor:
    """How many keys of each layer are up to `level`, (L,)."""
    return torch.searchsorted(keys, base + level, right=True) - start
