"""DiSparse: saliency by task; a shared weight is pruned only if all tasks agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_flag, check_numbers
from torch_adapmtl._distributed import agree
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import shaped_like
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods._lowest import lowest
from torch_adapmtl.methods.masks import OneShotController, task_gradients

__all__ = ["DiSparse", "DiSparseController"]


@dataclass(frozen=True)
class DiSparse(Method):
    """Disentangled sparsification (Sun et al., arXiv 2206.04662), static or dynamic.

    Every task ranks all weights that its loss depends on, shared or task-specific, by their
    connection sensitivity `|w * dL_t/dw|` on the first batch. The score of a weight is the highest
    rank that any task gives it, so that a shared weight is pruned only if its rank is low for every
    task. The first call of `loss()` prunes the weights with the lowest scores, as many as the
    target asks for. The first optimiser step still uses the gradients of the dense model. Weights
    with equal sensitivities get the same, lowest rank; among equal scores, the first weights in the
    order of the model are chosen.

    With `dynamic`, the masks move while the model trains. Every `interval` steps each layer prunes
    its smallest remaining weights, and the same number of pruned weights become trainable again,
    starting from zero: those whose gradients any task ranks highest. The share that moves decays
    along a cosine to zero at three quarters of the run.

    The authors' code (github.com/SHI-Labs/DiSparse-Multitask-Model-Compression) differs in four
    points. It scores 50 batches, on weights sampled for this purpose. The share of weights that
    every task keeps, which is solved here for the target, is a constant tuned for each data set.
    Dynamic masks start at random. The losses are multiplied by constants of the data set.

    Args:
        dynamic: Whether the masks move.
        fraction: Share of a layer's remaining weights that moves at first; in (0, 1).
        interval: Steps between two moves; a fiftieth of the run if None.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `fraction` is not a number.

    Warns:
        UserWarning: When the masks are set, if a tenth or more of the weights have a sensitivity of
            exactly zero. This is so in residual branches whose last scale starts at zero (timm's
            `zero_init_last`), which would be pruned entirely. Initialise those scales to 1.

    Example:
        >>> from torch_adapmtl import DiSparse
        >>> DiSparse(dynamic=True).fraction
        0.3
    """

    dynamic: bool = False
    fraction: float = 0.3
    interval: int | None = None

    def __post_init__(self) -> None:
        check_numbers(fraction=self.fraction)
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie in (0, 1), got {self.fraction}")
        if self.interval is not None:
            check_count("interval", self.interval)
        check_flag("dynamic", self.dynamic)

    def config(self) -> dict[str, Any]:
        """Return the settings, without those that have no effect."""
        return super().config() if self.dynamic else {"name": "DiSparse", "dynamic": False}

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> DiSparseController:
        """Make the controller."""
        return DiSparseController(self, layers, target_sparsity, total_steps)


class DiSparseController(OneShotController):
    """Prunes the weights with low ranks for all tasks, and moves the masks if `dynamic`."""

    _END = 0.75  # share of the run after which masks do not move

    def __init__(
        self, method: DiSparse, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, batches=1)
        self.method = method
        self.every = method.interval or max(1, total_steps // 50)
        # The highest rank of each weight over the tasks, by sensitivity and by gradient.
        self._sensitivity_ranks: list[Tensor] = []
        self._gradient_ranks: list[Tensor] = []
        self._effects: list[Tensor] = []
        self._ranking = False  # whether the gradients of the coming step are ranked

    def due(self, step: int) -> bool:
        """Whether masks move after `step` steps."""
        return step == self.total_steps or self._moves(step)

    def _moves(self, step: int) -> bool:
        due = self.method.dynamic and step % self.every == 0
        return due and step < self._END * self.total_steps

    def prepare(self, step: int, due: bool) -> None:
        """Rank the gradients of a step after which the masks move."""
        self._ranking = not self.fixed and self.scored and self._moves(step + 1)

    @torch.no_grad()
    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Rank the weights by connection sensitivity."""
        gradients = list(task_gradients(losses, self.layers).values())
        weights = [layer.weight for layer in self.layers]
        sensitivities = [
            [None if g is None else g * w for g, w in zip(by_layer, weights, strict=True)]
            for by_layer in gradients
        ]
        self._sensitivity_ranks = self._highest(sensitivities)
        self._effects = [torch.zeros_like(value) for value in self._sensitivity_ranks]
        for by_layer in sensitivities:
            for total, part in zip(self._effects, by_layer, strict=True):
                if part is not None:
                    total += part.abs().float().flatten()
        if self._moves(1):  # the gradients of the first batch are those of the dense model
            self._gradient_ranks = self._highest(gradients)

    @torch.no_grad()
    def observe_later(self, losses: Mapping[str, Tensor]) -> None:
        """Rank the gradients if the masks move after this step."""
        self._sensitivity_ranks, self._effects = [], []  # not needed once the masks are set
        if self._ranking:
            self._gradient_ranks = self._highest(task_gradients(losses, self.layers).values())

    def effects(self) -> list[Tensor]:
        """The connection sensitivities, summed over the tasks."""
        return self._effects

    def scores(self) -> list[Tensor]:
        """The highest rank that any task gives each weight."""
        # There are no ranks before the first batch: then magnitudes decide.
        return self._sensitivity_ranks or [layer.weight.abs() for layer in self.layers]

    def _highest(self, scores: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
        """Rank each task's scores by magnitude; return the highest rank over the tasks, flat."""
        weights = [layer.weight for layer in self.layers]
        best = [torch.zeros(weight.numel(), device=weight.device) for weight in weights]
        for task_scores in scores:
            present = {i: score for i, score in enumerate(task_scores) if score is not None}
            if not present:
                continue
            parts = [score.abs().float().flatten() for score in present.values()]
            ranks = _ranks(torch.cat(parts)).split([len(part) for part in parts])
            for i, rank in zip(present, ranks, strict=True):
                best[i] = torch.maximum(best[i], rank)
        return best

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune the smallest weights of each layer, and regrow as many by gradient rank."""
        share = (1 + math.cos(math.pi * step / (self._END * self.total_steps))) / 2
        for layer, ranks in zip(self.layers, self._gradient_ranks, strict=False):
            mask = layer.mask
            if mask is None:
                continue
            kept = mask.flatten()
            free = ~kept
            if layer.initial_mask is not None:  # initial zeros stay fixed
                free &= layer.initial_mask.to(free.device).flatten()
            count = int(self.method.fraction * share * int(kept.sum()))
            count = min(count, int(free.sum()))
            size = layer.weight.detach().abs().float().flatten().masked_fill(~kept, torch.inf)
            dropped = lowest([size], count)[0]
            grown = lowest([-ranks.masked_fill(~free, -torch.inf)], count)[0]
            if self.synchronize:
                agree(grown)
            layer.threshold.mask = shaped_like(layer.weight, (kept & ~dropped) | grown)
            moved = shaped_like(layer.weight, grown | dropped)
            layer.weight.copy_(layer.weight.masked_fill(moved, 0.0))
        self._gradient_ranks = []

    @torch.no_grad()
    def fix(self) -> None:
        """Fix the zeros of the present masks; prune first if no batch has been scored."""
        if not self.scored:
            super().fix()
            return
        self.fix_lowest([torch.ones_like(layer.weight) for layer in self.layers])


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each score as a fraction in [0, 1]; equal scores have the same, lowest rank.

    Args:
        scores: Non-negative, of shape (N,); NaN counts as the lowest.
    """
    scores = scores.nan_to_num(nan=-1.0, posinf=torch.inf)
    lower = torch.searchsorted(scores.sort().values, scores)
    return torch.linspace(0, 1, len(scores), device=scores.device)[lower]
