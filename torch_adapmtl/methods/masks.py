"""Pruning by scores and masks, to an exact number of zeros: the base of the baselines."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._distributed import agree
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.gradient_hooks import GradientHooks
from torch_adapmtl.layers.layer import shaped_like
from torch_adapmtl.methods._base import Controller, Method
from torch_adapmtl.methods._lowest import lowest, open_score
from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["MaskController", "MaskMethod", "OneShotController", "task_gradients"]


def task_gradients(losses: Mapping[str, Tensor], layers: Layers) -> dict[str, list[Tensor | None]]:
    """The gradient of each task's loss for each layer's weight; None if the loss is independent."""
    weights = [layer.weight for layer in layers]
    return {
        task: list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
        for task, loss in losses.items()
    }


class MaskMethod(Method):
    """A method whose masks follow a schedule but do not use its `fix_at` and `regrow_until`."""

    def config(self) -> dict[str, Any]:
        """Return the settings, without those of the schedule that have no effect."""
        config = super().config()
        for name in ("fix_at", "regrow_until"):
            config.get("schedule", {}).pop(name, None)
        return config


class MaskController(Controller):
    """Prunes the weights with the lowest scores, by masks that follow a schedule.

    A pruned weight gets no gradient and stays pruned. A subclass defines `scores`; see
    [Prune by a criterion of your own](../recipes/own-method.md).

    Args:
        layers: The layers. Their thresholds, all zero, are made here.
        target_sparsity: What is to be pruned at the end, as a fraction (see `Controller`).
        total_steps: Number of steps of the run.
        schedule: How the sparsity rises.

    Raises:
        ValueError: If initial masks fix more zeros than the target asks for.

    Example:
        >>> import torch
        >>> from torch_adapmtl import Layer, Layers, MaskController, SparsitySchedule
        >>> class LargestFirst(MaskController):
        ...     def scores(self):
        ...         return [-layer.weight.abs() for layer in self.layers]
        >>> linear = torch.nn.Linear(4, 4)
        >>> layers = Layers([Layer("weight", "main", ((linear, "weight"),))])
        >>> LargestFirst(layers, 0.5, 100, SparsitySchedule()).budget
        8
    """

    has_thresholds = False

    def __init__(
        self,
        layers: Layers,
        target_sparsity: float,
        total_steps: int,
        schedule: SparsitySchedule,
    ) -> None:
        check_schedule(schedule)
        super().__init__(layers, target_sparsity, total_steps)
        self.schedule = schedule
        self._initial = layers.cost(layers.initial_zeros)
        self.check_initial()
        for layer in layers:
            weight = layer.weight
            layer.threshold = SoftThreshold(0.0, persistent=False).to(weight.device, weight.dtype)
        self._hooks = GradientHooks(layers, self.on_gradient)

    @abstractmethod
    def scores(self) -> list[Tensor]:
        """Return the score of each weight: a tensor for each layer, in the weight's shape or flat.

        The weights with the lowest scores are pruned. NaN, or another number of tensors, is an
        error of the update.
        """

    def on_gradient(self, index: int, weight: nn.Parameter) -> None:
        """Use the gradient (`weight.grad`) that a layer's weight has just received.

        If a subclass overrides this, it is called in every backward pass until the zeros are fixed,
        or before the optimiser's step if no backward pass shows the gradient.

        Args:
            index: The index of the layer.
            weight: Its weight.
        """

    def thresholds(self) -> Tensor:
        """The thresholds, which are all zero."""
        return torch.zeros(len(self.layers), device=self.layers.device)

    def prepare(self, step: int, due: bool) -> None:
        """Register the gradient hooks if a subclass overrides `on_gradient`.

        A subclass that overrides this too has to call `super().prepare(step, due)`.
        """
        if self._uses_gradients:
            self._hooks.listen(not self.fixed, renew=due)
            if self.fixed:
                self._hooks.remove()

    @property
    def _uses_gradients(self) -> bool:
        return type(self).on_gradient is not MaskController.on_gradient

    def choose(self, budget: float) -> list[Tensor]:
        """Mark the weights to prune, as many as the budget: a flat bool tensor for each layer.

        Args:
            budget: How many, or how many multiply-adds they are to save (`layers.counts`).
        """
        return lowest(self.open_scores(), budget, self.layers.costs)

    def open_scores(self) -> list[Tensor]:
        """The scores, float32 and flat; -inf for weights that a mask has pruned already.

        Raises:
            ValueError: If the scores are not one tensor for each layer, or some are NaN.
        """
        scores, name = self.scores(), type(self).__name__
        if len(scores) != len(self.layers):
            raise ValueError(
                f"{name}.scores() returned {len(scores)} tensors for {len(self.layers)} layers: "
                f"return one for each of self.layers, in their order"
            )
        for score, layer in zip(scores, self.layers, strict=True):
            if bool(score.isnan().any()):
                raise ValueError(
                    f"{name}.scores() has NaN for {layer.name!r}, so there is no lowest score: "
                    f"look at what it computes (0 / 0, inf - inf), and at the weights"
                )
        return [open_score(score, layer) for score, layer in zip(scores, self.layers, strict=True)]

    def _agreed(self, budget: float) -> list[Tensor]:
        """The result of `choose`, made equal in all processes, whose batches differ."""
        chosen = self.choose(budget)
        return [agree(flat) for flat in chosen] if self.synchronize else chosen

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune to the sparsity of the schedule after `step` steps."""
        if self._uses_gradients:
            self._hooks.note_update(type(self).__name__.removesuffix("Controller"))
        self.prune(self.layers.budget(self.schedule(step, self.total_steps, self.target_sparsity)))

    @torch.no_grad()
    def prune(self, budget: float) -> None:
        """Prune the weights with the lowest scores, as many in total as the budget."""
        pruned = self._agreed(max(budget, self._initial))
        for layer, flat in zip(self.layers, pruned, strict=True):
            layer.threshold.mask = shaped_like(layer.weight, ~flat) if bool(flat.any()) else None

    @torch.no_grad()
    def fix(self) -> None:
        """Prune to exactly the target now, and fix the zeros by masks."""
        self.fix_zeros([~flat for flat in self._agreed(max(self.budget, self._initial))])

    def refresh(self) -> None:
        """Count the initial zeros of the loaded state; its parameters may be new ones."""
        self._hooks.remove()  # `prepare` registers them again
        self._initial = self.layers.cost(self.layers.initial_zeros)

    def store(self, name: str) -> None:
        """Register a float32 buffer of zeros for each layer; they are part of the state dict."""
        for i, layer in enumerate(self.layers):
            zeros = torch.zeros_like(layer.weight, dtype=torch.float32)
            self.register_buffer(f"{name}_{i}", zeros)

    def stored(self, name: str) -> list[Tensor]:
        """Return the buffers that `store` registered, one for each layer, in the weight's shape."""
        return [self.stored_at(name, i) for i in range(len(self.layers))]

    def stored_at(self, name: str, index: int) -> Tensor:
        """Return the buffer of one layer that `store` registered."""
        buffer = self._buffers[f"{name}_{index}"]
        assert buffer is not None
        return buffer


class OneShotController(MaskController):
    """Prunes to the target once, by scores from the gradients of the first batches.

    Args:
        layers: See `MaskController`.
        target_sparsity: See `MaskController`.
        total_steps: See `MaskController`.
        batches: How many batches to score. The masks are set after the last of them.
    """

    _MANY = 0.1  # share of weights without effect on the losses from which on there is a warning

    seen: Tensor

    def __init__(
        self, layers: Layers, target_sparsity: float, total_steps: int, batches: int
    ) -> None:
        never = SparsitySchedule(start=1.0, end=1.0)
        super().__init__(layers, target_sparsity, total_steps, never)
        self.batches = batches
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=layers.device))
        self._seen = 0  # the same on the host, because reading the buffer would wait for the device

    @abstractmethod
    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Add the contribution of one batch to the scores."""

    def effects(self) -> list[Tensor]:
        """The effect of each weight on the losses, by layer; zero if no loss depends on it."""
        return self.scores()

    def observe_later(self, losses: Mapping[str, Tensor]) -> None:
        """Receive the losses of a batch after the scored ones."""

    @property
    def scored(self) -> bool:
        """Whether all batches have been scored."""
        return self._seen == self.batches

    def due(self, step: int) -> bool:
        """Whether an update is due after `step` steps: at the end only."""
        return step == self.total_steps

    def refresh(self) -> None:
        """Read the number of scored batches from the loaded state."""
        super().refresh()
        self._seen = int(self.seen)

    def fix(self) -> None:
        """Prune to exactly the target now, and fix the zeros by masks.

        Raises:
            RuntimeError: If no batch has been scored: all weights would tie.
        """
        if self._seen == 0:
            raise RuntimeError(
                f"0 of {self.batches} batches have been scored, so there is nothing to prune by: "
                f"call pruner.loss(losses) with the losses of each step, in training "
                f"mode, before pruner.step() or fix_zeros()"
            )
        super().fix()

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Score the first batches, then prune; the masks act from the end of the step on."""
        if self.fixed or self.scored:
            self.observe_later(losses)
            return
        self.score(losses)
        self.seen += 1
        self._seen += 1
        if self._seen == self.batches:
            with torch.no_grad():
                share = self._share_without_effect()
                self.prune(self.budget)
            if share >= self._MANY and self.budget > self._initial:
                warnings.warn(
                    f"{share:.0%} of the prunable weights score exactly zero on the batches that "
                    f"were scored, since no loss depends on them yet, and are pruned first, whole "
                    f"layers of them. So do all residual branches whose last scale starts at zero, "
                    f"as timm's zero_init_last has them: start it at 1 (zero_init_last=False in "
                    f"timm). Otherwise look for dead units, or for a task without a loss in these "
                    f"batches",
                    stacklevel=3,
                )

    def _share_without_effect(self) -> float:
        pairs = zip(self.effects(), self.layers, strict=True)
        effects = torch.cat([open_score(effect, layer) for effect, layer in pairs])
        left = (effects != -torch.inf).sum().clamp(min=1)
        return float((effects == 0).sum() / left)
