"""Layer-adaptive magnitude: each layer's threshold from the weights that the layer has left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._allocator import Allocator
from ._layers import Layer
from ._sampling import Sample

__all__ = ["LAMP", "LAMPAllocation", "lamp_thresholds"]


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

    Example:
        >>> from torch_adapmtl import LAMPAllocation
        >>> LAMPAllocation(strength=1.0)
        LAMPAllocation(strength=1.0, rate=0.3, bound=5.0)
    """

    strength: float = 0.5
    rate: float = 0.3
    bound: float = 5.0

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 1 and 0 < self.rate <= 1 and 0 < self.bound < math.inf):
            raise ValueError(
                f"allocation: strength must lie in [0, 1], rate in (0, 1] and bound be > 0, got "
                f"strength={self.strength}, rate={self.rate}, bound={self.bound}"
            )


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
    """
    device = sizes.device
    lengths = torch.tensor(sample.lengths, device=device)
    stands_for = sizes / lengths.double()
    # Sorted by layer, then by magnitude: what is known by layer stays in place.
    order = sample.values.argsort()
    order = order[sample.layer[order].argsort(stable=True)]
    values = sample.values[order].clamp(min=0.0)  # a mask's zeros are -1
    last = lengths.cumsum(0)
    largest = values[last - 1].double().clamp(min=torch.finfo(torch.float32).tiny)
    square = (values / largest[sample.layer]).square()  # in units of the layer's own
    summed = square.cumsum(0)
    # What the weights from this one on in its layer sum to, itself included.
    rest = (summed[last - 1][sample.layer] - summed + square) * stands_for[sample.layer]
    score = torch.where(square > 0, square / rest, 0.0)

    ranked = score.argsort()
    pruned = stands_for[sample.layer[ranked]].cumsum(0)
    wanted = torch.tensor([zeros], dtype=pruned.dtype, device=device)
    # The last one that the budget has room for, rounded: none if it has room for none.
    place = torch.searchsorted(pruned, wanted + 0.5) - 1
    cut = torch.where(place < 0, -1.0, score[ranked[place.clamp(min=0)]])
    count = torch.zeros_like(lengths).index_add_(0, sample.layer, (score <= cut).long())
    start = last - lengths
    highest = values[(start + count - 1).clamp(min=0)]
    return torch.where(count > 0, highest, 0.0)
