"""The weights with the lowest of all scores, in one sort of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer

__all__ = ["lowest", "open_score"]


def lowest(
    scores: Sequence[Tensor], budget: float, costs: Sequence[float] | None = None
) -> list[Tensor]:
    """Mark the lowest scores of all tensors together; among equal scores, the first ones.

    Args:
        scores: Tensors of any shapes. -inf, the score of weights that are pruned already, is the
            lowest; NaN counts as the next lowest.
        budget: The total cost of what is marked: the number of scores, if all costs are 1.
        costs: The cost of marking a score of each tensor; 1 if None. The total cost of what is
            marked differs from the budget by at most half of the largest cost.

    Returns:
        A flat boolean tensor for each of `scores`.
    """
    flat = torch.cat([part.flatten() for part in scores])
    # NaN must rank above -inf: otherwise a pruned weight could become nonzero again.
    least = torch.finfo(flat.dtype).min
    flat = flat.nan_to_num(nan=least, posinf=torch.inf, neginf=-torch.inf)
    sizes = [part.numel() for part in scores]
    count = math.ceil(budget - 0.5)  # the nearest integer
    if costs is not None and any(cost != 1 for cost in costs):
        order = flat.argsort(stable=True)
        cost = torch.tensor(costs, dtype=torch.float64, device=flat.device)
        cost = cost.repeat_interleave(torch.tensor(sizes, device=flat.device))[order]
        # A score is marked if that leaves the total nearer to the budget.
        count = int((cost.cumsum(0) - cost / 2 < budget).sum())
        marked = torch.zeros_like(flat, dtype=torch.bool)
        marked[order[:count]] = True
    elif count == 0:
        marked = torch.zeros_like(flat, dtype=torch.bool)
    else:
        level = flat.kthvalue(count).values
        marked = flat < level
        ties = (flat == level).nonzero().squeeze(1)
        marked[ties[: count - int(marked.sum())]] = True
    return list(marked.split(sizes))


def open_score(score: Tensor, layer: Layer) -> Tensor:
    """A layer's scores, float32 and flat; -inf for weights that its mask has pruned already."""
    size = layer.weight.numel()
    if score.numel() != size:
        raise ValueError(
            f"scores: {layer.name!r} has {size} weights of shape {tuple(layer.weight.shape)}, got "
            f"scores of shape {tuple(score.shape)}; return one score for each weight (expand those "
            f"of whole channels)"
        )
    score = score.detach().float().flatten()
    if layer.mask is None:
        return score
    return score.masked_fill(~layer.mask.to(score.device).flatten(), -torch.inf)
