"""Magnitude pruning, over the whole model or uniformly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torch_adapmtl.methods._base import Mode
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.methods._masks import Masked, lowest
from torch_adapmtl.budget.solver import SparsitySchedule

__all__ = ["Magnitude", "MagnitudeMasks"]


@dataclass(frozen=True)
class Magnitude(Mode):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the smallest weights go.

    One-shot pruning with fine-tuning is the same with a schedule of no length, such as
    `SparsitySchedule(start=0.5, end=0.5)`.

    Args:
        scope: `"global"`: one threshold for the whole model; `"uniform"`: the same sparsity in
            every layer.
        schedule: How the sparsity rises.

    Raises:
        ValueError: If `scope` is neither.

    Example:
        >>> from torch_adapmtl.methods import Magnitude
        >>> Magnitude(scope="uniform").scope
        'uniform'
    """

    scope: Literal["global", "uniform"] = "global"
    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def __post_init__(self) -> None:
        if self.scope not in ("global", "uniform"):
            raise ValueError(f"scope must be 'global' or 'uniform', got {self.scope!r}")

    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> MagnitudeMasks:
        """Make the controller."""
        return MagnitudeMasks(
            layers,
            target=target,
            total_steps=total_steps,
            schedule=self.schedule,
            uniform=self.scope == "uniform",
        )


class MagnitudeMasks(Masked):
    """The masks of `Magnitude`.

    Args:
        layers: See `Masked`.
        target: See `Masked`.
        total_steps: See `Masked`.
        schedule: See `Masked`.
        uniform: Whether every layer gets the same sparsity.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        schedule: SparsitySchedule,
        uniform: bool = False,
    ) -> None:
        super().__init__(layers, target=target, total_steps=total_steps, schedule=schedule)
        self.uniform = uniform

    def scores(self) -> list[Tensor]:
        """The magnitudes."""
        return self.unmasked(lambda layer, _: layer.weight.abs())

    def choose(self, zeros: int) -> list[Tensor]:
        """Mark the smallest weights: of all, or of every layer its share."""
        scores = self.scores()
        if not self.uniform:
            return lowest(scores, zeros)
        gone = [int((own == -torch.inf).sum()) for own in scores]
        shares = _shares(zeros, self._sizes, gone)
        return [lowest([own], share)[0] for own, share in zip(scores, shares, strict=True)]


def _shares(zeros: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """Split `zeros` in proportion to `sizes`, in whole numbers that sum to it, none below `least`.

    The least are at most `zeros` together.
    """
    shares = list(least)
    free = list(range(len(sizes)))
    while free:
        total, before = sum(sizes[i] for i in free), 0
        rest = zeros - sum(shares[i] for i in range(len(sizes)) if i not in free)
        own = {}
        for i in free:
            after = before + sizes[i]
            own[i] = rest * after // total - rest * before // total
            before = after
        short = [i for i in free if own[i] < least[i]]
        if not short:
            for i in free:
                shares[i] = own[i]
            break
        free = [i for i in free if i not in short]
    return shares
