"""Magnitude pruning: globally, or with the same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods._lowest import lowest
from torch_adapmtl.methods.masks import MaskController, MaskMethod

__all__ = ["Magnitude", "MagnitudeController"]


@dataclass(frozen=True)
class Magnitude(MaskMethod):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the smallest weights first.

    For one-shot pruning with finetuning, pass a schedule that ends where it starts, such as
    `SparsitySchedule(start=0.5, end=0.5)`.

    Args:
        scope: `"global"`: the smallest weights of the whole model are pruned. `"uniform"`: every
            layer has the same sparsity.
        schedule: How the sparsity rises.

    Raises:
        ValueError: If `scope` is another value.

    Example:
        >>> from torch_adapmtl import Magnitude
        >>> Magnitude(scope="uniform").scope
        'uniform'
    """

    scope: Literal["global", "uniform"] = "global"
    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("global", "uniform"))
        check_schedule(self.schedule)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> MagnitudeController:
        """Make the controller."""
        uniform = self.scope == "uniform"
        return MagnitudeController(
            layers, target_sparsity, total_steps, self.schedule, uniform=uniform
        )


class MagnitudeController(MaskController):
    """Prunes the weights with the smallest magnitudes.

    Args:
        layers: See `MaskController`.
        target_sparsity: See `MaskController`.
        total_steps: See `MaskController`.
        schedule: See `MaskController`.
        uniform: Whether every layer has the same sparsity.
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
        """The magnitude of each weight."""
        return [layer.weight.abs() for layer in self.layers]

    def choose(self, budget: float) -> list[Tensor]:
        """Mark the smallest weights of the model, or of each layer in proportion to its size."""
        if not self.uniform:
            return super().choose(budget)
        scores = self.open_scores()
        pruned = [int((score == -torch.inf).sum()) for score in scores]
        shares = _shares(budget, self.layers.sizes, pruned, self.layers.costs)
        return [lowest([score], share)[0] for score, share in zip(scores, shares, strict=True)]


def _shares(
    budget: float, sizes: Sequence[int], least: Sequence[int], costs: Sequence[float]
) -> list[int]:
    """Split a budget in proportion to `sizes` into numbers of zeros.

    Their total cost is the budget if all costs are 1, and otherwise less than it by less than the
    largest cost. No number is smaller than its entry of `least`, whose cost must be at most the
    budget.
    """
    shares = list(least)
    # From the largest cost to the smallest, because what one layer leaves over goes to the next.
    free = sorted(range(len(sizes)), key=lambda i: -costs[i])
    while free:
        total = sum(sizes[i] * costs[i] for i in free)
        rest = budget - sum(shares[i] * costs[i] for i in range(len(sizes)) if i not in free)
        proportional = {}
        before: float = 0
        pruned: float = 0
        for i in free:
            before += sizes[i] * costs[i]
            number = (rest * before - pruned * total) // (total * costs[i])
            proportional[i] = min(int(number), sizes[i])
            pruned += proportional[i] * costs[i]
        short = [i for i in free if proportional[i] < least[i]]
        if not short:
            for i in free:
                shares[i] = proportional[i]
            break
        free = [i for i in free if i not in short]
    return shares
