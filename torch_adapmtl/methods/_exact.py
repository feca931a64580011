"""The exact choice of the weights with the lowest scores, in a few passes over all weights."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_adapmtl.budget.solver import MAX_BITS, Bounds, Scores, from_bits, select, solve
from torch_adapmtl.layers import sampling
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.layers.sampling import Sample, magnitudes

__all__ = ["choose"]

_TINY = torch.finfo(torch.float32).tiny


def choose(layers: Layers, factors: Tensor, bounds: Bounds, budget: float) -> list[Tensor]:
    """Choose the weights that remain when the others meet the budget, lowest scores first.

    A sample gives a window of levels that contains the exact levels, so that only the scores in
    this window are sorted.

    Args:
        layers: The layers.
        factors: The factor of each layer, (L,): a score is the magnitude times the factor.
        bounds: The bounds and costs.
        budget: The total cost of the weights to prune; their number, if all costs are 1.

    Returns:
        Which weights of each layer remain, one flat bool tensor for each layer.
    """
    sample = Sample.draw(layers, large=True)
    scores = Scores(sample.values, sample.lengths, sample.weights).scaled(factors)
    wanted = torch.tensor(budget, dtype=torch.float64, device=factors.device)
    low, high = scores.window(solve(scores, bounds, wanted))
    level, numbers = select(_near(layers, factors, low, high), bounds, budget)
    exact = torch.tensor(level, device=factors.device)
    if not bool(((low <= exact) & (exact <= high)).all()):  # the sample was not representative
        low, high = torch.full_like(low, -1), torch.full_like(high, MAX_BITS)
        level, numbers = select(_near(layers, factors, low, high), bounds, budget)
    rows = zip(layers, factors.tolist(), level, numbers, strict=True)
    return [_remaining(*row) for row in rows]


def _near(layers: Layers, factors: Tensor, low: Tensor, high: Tensor) -> Scores:
    """The scores within each layer's window of levels, and the number of scores below it."""
    device = factors.device
    lows = torch.where(low < 1, -torch.inf, from_bits(low)).tolist()
    highs = torch.where(high < MAX_BITS, from_bits(high), torch.inf).tolist()
    parts, lengths, below = [], [], []
    for layer, factor, least, most in zip(layers, factors.tolist(), lows, highs, strict=True):
        lower = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        pieces = []
        for piece in magnitudes(layer):
            piece.mul_(factor)
            under = piece < least
            lower += under.sum()
            pieces.append(piece[(piece <= most).logical_and_(under.logical_not_())])
        parts += [piece.to(device) for piece in pieces]
        lengths.append(sum(map(len, pieces)))
        below.append(lower.to(device))
    return Scores(torch.cat(parts), lengths, below=torch.stack(below))


def _remaining(layer: Layer, factor: float, level: int, zeros: int) -> Tensor:
    """Mark the weights of a layer that remain, bool and flat, from the result of `select`.

    All weights with scores below the level are pruned. Of the weights whose score equals the level,
    the first in storage order are pruned, until `zeros` weights are pruned.
    """
    keep = torch.ones(layer.weight.numel(), dtype=torch.bool, device=layer.weight.device)
    if zeros == 0:
        return keep
    # Level 0 stands for weights that a mask keeps at zero, whose scores are negative. The last
    # level also stands for all scores that are not finite.
    lowest = float(from_bits(torch.tensor(level))) if level > 0 else -torch.inf
    highest = torch.inf if level == MAX_BITS else lowest if level > 0 else -_TINY
    places = keep.split(sampling.PIECE if keep.device.type == "cpu" else len(keep))
    for piece, place in zip(magnitudes(layer), places, strict=True):
        torch.ge(piece.mul_(factor), lowest, out=place)
    missing = zeros - (len(keep) - int(torch.count_nonzero(keep)))
    for piece, place in zip(magnitudes(layer), places, strict=True):
        if missing == 0:
            break
        ties = (place & (piece.mul_(factor) <= highest)).nonzero().squeeze(1)[:missing]
        place[ties] = False
        missing -= len(ties)
    return keep
