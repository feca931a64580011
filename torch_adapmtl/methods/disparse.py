"""DiSparse: saliency by task, and pruning only where every task agrees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl.methods._base import Mode
from torch_adapmtl._distributed import agree
from torch_adapmtl.layers.gradient_hooks import GradientHooks
from torch_adapmtl.layers.layer import Layer, shaped_like
from torch_adapmtl.methods._masks import OneShot, lowest, task_gradients
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = ["DiSparse", "DiSparseMasks"]


@dataclass(frozen=True)
class DiSparse(Mode):
    """Disentangled sparsification (Sun et al., arXiv 2206.04662), static or dynamic.

    Every task ranks the weights it depends on, shared and its own, by its own connection
    sensitivity `|w * dL_t/dw|` on the first batch. A weight is as valuable as the task that ranks
    it highest finds it, so that a shared one is pruned only when every task agrees; the least
    valuable ones go, as many as the target asks for, in the first `step()` (the optimiser's first
    step is still that of the dense model). Equal sensitivities have the same rank, that
    of the lowest; where it is the last to go or to grow, those first in the model's order do.

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

    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> DiSparseMasks:
        """Make the controller."""
        return DiSparseMasks(layers, target=target, total_steps=total_steps, mode=self)


class _Window(SoftThreshold):
    """A mask through which, while it is open, the gradient of pruned weights can be seen."""

    open = False

    def forward(self, weight: Tensor) -> Tensor:
        masked = super().forward(weight)
        return weight + (masked - weight).detach() if self.open else masked


class DiSparseMasks(OneShot):
    """The masks of `DiSparse`."""

    _END = 0.75

    asleep = True  # a copy listens to no gradients before its first loss

    def __init__(
        self, layers: Sequence[Layer], *, target: float, total_steps: int, mode: DiSparse
    ) -> None:
        super().__init__(layers, target=target, total_steps=total_steps, batches=1)
        self.mode = mode
        self.every = mode.interval or max(1, total_steps // 50)
        # Of each weight, the highest rank that a task gives it: by sensitivity, and by gradient.
        self._value: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._effects: list[Tensor] = []
        self._hooks = GradientHooks(self.layers, self._close)
        for layer in layers:
            weight = layer.weight
            layer.threshold = _Window(0.0, persistent=False).to(weight.device, weight.dtype)

    def due(self, step: int) -> bool:
        """Whether masks move after `step` steps."""
        return step == self.total_steps or self._moves(step)

    def _moves(self, step: int) -> bool:
        due = self.mode.dynamic and step % self.every == 0
        return due and step < self._END * self.total_steps

    def wake(self, step: int) -> None:
        """Open the masks for the gradients of a step after which they move."""
        self.asleep = False
        opened = not self.frozen and self._seen == self.batches and self._moves(step + 1)
        for layer in self.layers:
            assert isinstance(layer.threshold, _Window)
            layer.threshold.open = opened
        self._hooks.listen(opened)

    def _close(self, index: int, parameter: nn.Parameter) -> None:
        # The optimiser must not see the gradient of a pruned weight.
        mask = self.layers[index].threshold.mask
        if mask is not None and parameter.grad is not None:
            parameter.grad.mul_(mask)

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
    def follow(self, losses: Mapping[str, Tensor]) -> None:
        """Rank the gradients where masks move."""
        self._value, self._effects = [], []  # the masks are made
        threshold = self.layers[0].threshold
        assert isinstance(threshold, _Window)
        if threshold.open:
            self._wanted = self._highest(task_gradients(losses, self.layers).values())

    def effects(self) -> list[Tensor]:
        """The connection sensitivities, summed over the tasks."""
        return self.unmasked(lambda _, i: self._effects[i])

    def scores(self) -> list[Tensor]:
        """The highest rank that a task gives each weight."""
        if not self._value:  # frozen early, or loaded from a state: the masks decide
            return self.unmasked(lambda layer, _: layer.weight.abs())
        return self.unmasked(lambda _, i: self._value[i])

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
        """Drop the smallest weights of every layer, and grow the most wanted others."""
        share = (1 + math.cos(math.pi * step / (self._END * self.total_steps))) / 2
        for layer, value in zip(self.layers, self._wanted, strict=False):
            mask = layer.threshold.mask
            if mask is None:
                continue
            alive = mask.flatten()
            gone = ~alive
            given = layer.given_mask  # what it leaves out was zero before, and stays so
            free = gone if given is None else gone & given.to(gone.device).flatten()
            count = int(self.mode.fraction * share * int(alive.sum()))
            count = min(count, int(free.sum()))
            size = layer.weight.detach().abs().float().flatten().masked_fill(gone, torch.inf)
            dropped = lowest([size], count)[0]
            wanted = value.masked_fill(~free, -torch.inf)
            grown = lowest([-wanted], count)[0]
            if self.synchronize:
                agree(grown)
            layer.threshold.mask = shaped_like(layer.weight, (alive & ~dropped) | grown)
            layer.weight.copy_(
                layer.weight.masked_fill(shaped_like(layer.weight, grown | dropped), 0.0)
            )
        self._wanted = []

    @torch.no_grad()
    def freeze(self) -> None:
        """Hold the zeros by the masks as they are."""
        if self._seen < self.batches:
            super().freeze()
            return
        alive = self.unmasked(lambda layer, _: torch.ones_like(layer.weight))
        self.hold([~flat for flat in lowest(alive, self.zeros)])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "asleep": True}


def _ranks(scores: Tensor) -> Tensor:
    """The share of the others that each score exceeds: equal ones have the same.

    Args:
        scores: Non-negative, of shape (N,); NaN counts as the lowest.
    """
    scores = scores.nan_to_num(nan=-1.0, posinf=torch.inf)
    lower = torch.searchsorted(scores.sort().values, scores)
    return torch.linspace(0, 1, len(scores), device=scores.device)[lower]
