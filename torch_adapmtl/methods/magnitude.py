"""Magnitude pruning, over the whole model or uniformly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice
from torch_adapmtl.budget.schedule import SparsitySchedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods.masks import MaskController, MaskMethod, lowest

__all__ = ["Magnitude", "MagnitudeController"]


@dataclass(frozen=True)
class Magnitude(MaskMethod):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the smallest weights first.

    One-shot pruning with finetuning is the same with a schedule of no length, such as
    `SparsitySchedule(start=0.5, end=0.5)`.

    Args:
        scope: `"global"`: one threshold for the whole model; `"uniform"`: the same sparsity in
            every layer.
        schedule: How the sparsity rises.

    Raises:
        ValueError: If `scope` is neither.

    Example:
        >>> from torch_adapmtl import Magnitude
        >>> Magnitude(scope="uniform").scope
        'uniform'
    """

    scope: Literal["global", "uniform"] = "global"
    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("global", "uniform"))

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> MagnitudeController:
        """Make the controller."""
        uniform = self.scope == "uniform"
        return MagnitudeController(
            layers, target_sparsity, total_steps, self.schedule, uniform=uniform
        )


class MagnitudeController(MaskController):
    """Masks the weights of the smallest magnitude.

    Args:
        layers: See `MaskController`.
        target_sparsity: See `MaskController`.
        total_steps: See `MaskController`.
        schedule: See `MaskController`.
        uniform: Whether every layer gets the same sparsity.
    """

    def __init__(
        self,
        layers: Layers,
        target_sparsity: float,
        total_steps: int,
        schedule: SparsitySchedule,
        *,
        uniform: bool = False,
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, schedule)
        self.uniform = uniform

    def scores(self) -> list[Tensor]:
        """The magnitudes."""
        return [layer.weight.abs() for layer in self.layers]

    def choose(self, zeros: int) -> list[Tensor]:
        """Mark the smallest weights: of all, or of every layer its share."""
        if not self.uniform:
            return super().choose(zeros)
        scores = self.open_scores()
        pruned = [int((score == -torch.inf).sum()) for score in scores]
        shares = _shares(zeros, self.layers.sizes, pruned)
        return [lowest([score], share)[0] for score, share in zip(scores, shares, strict=True)]


def _shares(zeros: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """Split `zeros` in proportion to `sizes`, in whole numbers that sum to it, none below `least`.

    The least are at most `zeros` together.
    """
    shares = list(least)
    free = list(range(len(sizes)))
    while free:
        total, before = sum(sizes[i] for i in free), 0
        rest = zeros - sum(shares[i] for i in range(len(sizes)) if i not in free)
        proportional = {}
        for i in free:
            after = before + sizes[i]
            proportional[i] = rest * after // total - rest * before // total
            before = after
        short = [i for i in free if proportional[i] < least[i]]
        if not short:
            for i in free:
                shares[i] = proportional[i]
            break
        free = [i for i in free if i not in short]
    return shares
