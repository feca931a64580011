"""DiSparse: saliency by task, and pruning only where every task agrees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl._distributed import agree
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import shaped_like
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods.masks import OneShotController, lowest, task_gradients
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = ["DiSparse", "DiSparseController"]


@dataclass(frozen=True)
class DiSparse(Method):
    """Disentangled sparsification (Sun et al., arXiv 2206.04662), static or dynamic.

    Every task ranks the weights it depends on, shared and its own, by its connection sensitivity
    `|w * dL_t/dw|` on the first batch. The value of a weight is the highest rank that a task gives
    it, so that a shared weight is pruned only when every task agrees. The weights of least value
    are pruned, as many as the target asks for, by the first `loss()`; the first optimiser step is
    still that of the dense model. Equal sensitivities have the same rank, that of the lowest; among
    weights of equal value the first in the model's order are pruned, and grown, first.

    With `dynamic`, the masks move while the model trains: every `interval` steps each layer drops
    the smallest of its weights and grows as many others, those whose gradient some task ranks
    highest (from zero). The share that moves decays by a cosine to nothing at three quarters of the
    run.

    The authors' code (github.com/SHI-Labs/DiSparse-Multitask-Model-Compression) differs: it scores
    50 batches, on weights drawn for the purpose; the share that every task keeps of its weights,
    solved here for the target, is a number found for each data set; dynamic masks start at random;
    and the losses are multiplied by numbers of the data set.

    Args:
        dynamic: Whether the masks move.
        fraction: The share of a layer's remaining weights that moves at first; in (0, 1).
        interval: Steps between two moves; a fiftieth of the run if None.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `fraction` is no number.

    Warns:
        UserWarning: When the scores are read, if a tenth of the weights or more score exactly zero,
            as all do in residual branches whose last scale starts at zero (timm's
            `zero_init_last`): they would be pruned whole. Start those scales at 1.

    Example:
        >>> from torch_adapmtl.methods import DiSparse
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

    def config(self) -> dict[str, Any]:
        """Return the settings, without those that have no effect."""
        return super().config() if self.dynamic else {"name": "DiSparse", "dynamic": False}

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> DiSparseController:
        """Make the controller."""
        return DiSparseController(self, layers, target_sparsity, total_steps)


class _Window(SoftThreshold):
    """A mask that, while it is open, lets the gradient of pruned weights pass."""

    open = False

    def forward(self, weight: Tensor) -> Tensor:
        masked = super().forward(weight)
        return weight + (masked - weight).detach() if self.open else masked


class DiSparseController(OneShotController):
    """Masks the weights that no task values, and moves the masks if the method is dynamic."""

    _END = 0.75  # of the run; after it the masks stay

    def __init__(
        self, method: DiSparse, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, batches=1)
        self.method = method
        self.every = method.interval or max(1, total_steps // 50)
        # Of each weight, the highest rank that a task gives it: by sensitivity, and by gradient.
        self._value: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._effects: list[Tensor] = []
        for layer in layers:
            weight = layer.weight
            layer.threshold = _Window(0.0, persistent=False).to(weight.device, weight.dtype)

    def due(self, step: int) -> bool:
        """Whether masks move after `step` steps."""
        return step == self.total_steps or self._moves(step)

    def _moves(self, step: int) -> bool:
        due = self.method.dynamic and step % self.every == 0
        return due and step < self._END * self.total_steps

    def prepare(self, step: int, due: bool) -> None:
        """Open the masks for the gradients of a step after which they move."""
        opened = not self.fixed and self.scored and self._moves(step + 1)
        for layer in self.layers:
            assert isinstance(layer.threshold, _Window)
            layer.threshold.open = opened
        self._hooks.listen(opened)

    def on_gradient(self, index: int, weight: nn.Parameter) -> None:
        """Hide the gradient of pruned weights from the optimiser."""
        mask = self.layers[index].mask
        if mask is not None and weight.grad is not None:
            weight.grad.mul_(mask)

    @torch.no_grad()
    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Rank the weights by connection sensitivity."""
        gradients = list(task_gradients(losses, self.layers).values())
        weights = [layer.weight for layer in self.layers]
        sensitivities = [
            [None if g is None else g * w for g, w in zip(own, weights, strict=True)]
            for own in gradients
        ]
        self._value = self._highest(sensitivities)
        self._effects = [torch.zeros_like(value) for value in self._value]
        for own in sensitivities:
            for total, part in zip(self._effects, own, strict=True):
                if part is not None:
                    total += part.abs().float().flatten()
        if self._moves(1):  # no mask hides a gradient of the first batch
            self._wanted = self._highest(gradients)

    @torch.no_grad()
    def observe_later(self, losses: Mapping[str, Tensor]) -> None:
        """Rank the gradients where masks move."""
        self._value, self._effects = [], []  # the masks are made
        threshold = self.layers[0].threshold
        assert isinstance(threshold, _Window)
        if threshold.open:
            self._wanted = self._highest(task_gradients(losses, self.layers).values())

    def effects(self) -> list[Tensor]:
        """The connection sensitivities, summed over the tasks."""
        return self._effects

    def scores(self) -> list[Tensor]:
        """The highest rank that a task gives each weight."""
        # Without values (fixed early, or loaded from a state) the masks decide.
        return self._value or [layer.weight.abs() for layer in self.layers]

    def _highest(self, scores: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
        """Rank each task's scores by their size; of all tasks the highest rank, flat."""
        weights = [layer.weight for layer in self.layers]
        best = [torch.zeros(weight.numel(), device=weight.device) for weight in weights]
        for own in scores:
            found = {i: score for i, score in enumerate(own) if score is not None}
            if not found:
                continue
            parts = [score.abs().float().flatten() for score in found.values()]
            ranks = _ranks(torch.cat(parts)).split([len(part) for part in parts])
            for i, rank in zip(found, ranks, strict=True):
                best[i] = torch.maximum(best[i], rank)
        return best

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Drop the smallest weights of every layer, and grow as many of the most wanted others."""
        share = (1 + math.cos(math.pi * step / (self._END * self.total_steps))) / 2
        for layer, value in zip(self.layers, self._wanted, strict=False):
            mask = layer.mask
            if mask is None:
                continue
            kept = mask.flatten()
            free = ~kept
            if layer.initial_mask is not None:  # its zeros were there before, and stay
                free &= layer.initial_mask.to(free.device).flatten()
            count = int(self.method.fraction * share * int(kept.sum()))
            count = min(count, int(free.sum()))
            size = layer.weight.detach().abs().float().flatten().masked_fill(~kept, torch.inf)
            dropped = lowest([size], count)[0]
            grown = lowest([-value.masked_fill(~free, -torch.inf)], count)[0]
            if self.synchronize:
                agree(grown)
            layer.threshold.mask = shaped_like(layer.weight, (kept & ~dropped) | grown)
            moved = shaped_like(layer.weight, grown | dropped)
            layer.weight.copy_(layer.weight.masked_fill(moved, 0.0))
        self._wanted = []

    @torch.no_grad()
    def fix(self) -> None:
        """Fix the zeros by the masks as they are."""
        if not self.scored:
            super().fix()
            return
        ones = [torch.ones_like(layer.weight) for layer in self.layers]
        pairs = zip(ones, self.layers, strict=True)
        pruned = lowest([self._open(one, layer.mask) for one, layer in pairs], self.zeros)
        self.fix_zeros([~flat for flat in pruned])


def _ranks(scores: Tensor) -> Tensor:
    """The share of the others that each score exceeds: equal ones have the same.

    Args:
        scores: Not negative, of shape (N,); NaN counts as the lowest.
    """
    scores = scores.nan_to_num(nan=-1.0, posinf=torch.inf)
    lower = torch.searchsorted(scores.sort().values, scores)
    return torch.linspace(0, 1, len(scores), device=scores.device)[lower]
