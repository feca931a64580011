"""The weights with the lowest of all scores, in one sort of them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer

__all__ = ["lowest", "open_score"]


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` lowest scores of all tensors together; among equal scores, the first ones.

    Args:
        scores: Tensors of any shapes. -inf, the score of weights that are pruned already, is the
            lowest; NaN counts as the next lowest.
        count: How many scores to mark.

    Returns:
        A flat boolean tensor for each of `scores`.
    """
    flat = torch.cat([part.flatten() for part in scores])
    # NaN must rank above -inf: otherwise a pruned weight could become nonzero again.
    least = torch.finfo(flat.dtype).min
    flat = flat.nan_to_num(nan=least, posinf=torch.inf, neginf=-torch.inf)
    if count == 0:
        marked = torch.zeros_like(flat, dtype=torch.bool)
    else:
        level = flat.kthvalue(count).values
        marked = flat < level
        ties = (flat == level).nonzero().squeeze(1)
        marked[ties[: count - int(marked.sum())]] = True
    return list(marked.split([part.numel() for part in scores]))


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
