"""Layer-adaptive magnitude: each layer's threshold from the weights that the layer has left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_adapmtl.allocation._base import Allocator
from torch_adapmtl._checks import check_numbers
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.layers.sampling import Sample
from torch_adapmtl.budget.solver import bisect, from_bits, to_bits

__all__ = ["LAMP", "LAMPAllocation", "lamp_thresholds"]

# Squares of magnitudes are summed in units of the largest in their layer over this.
_UNIT = 2.0**40


@dataclass(frozen=True)
class LAMPAllocation:
    r"""Offsets from layer-adaptive magnitudes: pruning costs every layer's output the same share.

    The score of a weight is its square over the sum of the squares of the weights of its layer
    that are no smaller (LAMP, Lee et al., arXiv 2010.07611): a bound on how much of the layer's
    output goes with it. The weights with the lowest scores of all layers together, as many as the
    budget asks for, say which threshold \(\alpha_l\) each layer would have. At every update the
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


class LAMP(Allocator):
    """Moves the offsets as `LAMPAllocation` says.

    Args:
        layers: The layers, in the model's order.
        options: The settings.
        pool: For each layer the number of the pool of layers that share its offset.
    """

    def __init__(
        self, layers: Sequence[Layer], options: LAMPAllocation, pool: Sequence[int]
    ) -> None:
        super().__init__()
        self.options = options
        self._pool = list(pool)
        self._sizes = [layer.weight.numel() for layer in layers]

    def moves(self, sample: Sample, thresholds: Tensor, offsets: Tensor, zeros: float) -> Tensor:
        """Say how far each layer's offset should move."""
        sizes = torch.tensor(self._sizes, device=offsets.device)
        alpha = lamp_thresholds(sample, sizes, zeros)
        known = alpha > 0  # else there is no logarithm: nothing pruned yet, or all weights zero
        weight = sizes * known
        log = alpha.masked_fill(~known, 1.0).log()
        pool = torch.tensor(self._pool, device=offsets.device)

        def summed(values: Tensor) -> Tensor:
            return torch.zeros_like(values).index_add_(0, pool, values)[pool]

        pooled = summed(log * weight) / summed(weight.to(log.dtype))
        mean = (log * weight).sum() / weight.sum()
        move = self.options.rate * (self.options.strength * (pooled - mean) - offsets)
        return torch.where(move.isfinite(), move, 0.0)


def lamp_thresholds(sample: Sample, sizes: Tensor, zeros: float) -> Tensor:
    """The threshold of each layer at which LAMP prunes `zeros` weights of them all.

    Args:
        sample: The magnitudes of the layers' weights, or of a sample of them.
        sizes: How many weights each layer has, (L,).
        zeros: How many to prune.

    Returns:
        The largest magnitude that is pruned in each layer, float32 of shape (L,); 0 where none is.
        Of weights whose scores tie all are pruned.
    """
    lengths = torch.tensor(sample.lengths, device=sizes.device)
    stands_for = sizes / lengths.double()
    # Layer in the high word, magnitude in the low one: one sort orders every layer's weights.
    keys = ((sample.layer << 32) | to_bits(sample.values)).sort().values
    values = from_bits(keys & 0xFFFFFFFF)
    last = lengths.cumsum(0)
    largest = values[last - 1].double().clamp(min=torch.finfo(torch.float32).tiny)
    square = (values / largest[sample.layer]).square()  # in units of the layer's largest
    # Whole numbers: sums of them are exact, and the same in any order.
    whole = (square * _UNIT).long()
    summed = whole.cumsum(0)
    # What the weights from this one on in its layer sum to, itself included.
    rest = (summed[last - 1][sample.layer] - summed + whole).double() / _UNIT
    score = square / (rest * stands_for[sample.layer])
    score = torch.where(square > 0, score, 0.0).float()

    def count(level: Tensor) -> Tensor:
        found = torch.searchsorted(ranks, base + level, right=True) - start
        return (found * stands_for).sum()

    start = last - lengths
    base = torch.arange(len(lengths), device=sizes.device) << 32
    ranks = (sample.layer << 32) | to_bits(score)
    wanted = torch.full((), zeros, dtype=torch.float64, device=sizes.device)
    level = bisect(count, wanted)
    found = torch.searchsorted(ranks, base + level.clamp(min=0), right=True) - start
    found = torch.where(level < 0, 0, found)
    return torch.where(found > 0, values[(start + found - 1).clamp(min=0)], 0.0)
