"""The mechanism as published: one sigmoid threshold per component, raised by weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice, check_numbers
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.pooled import Pooled, PooledThreshold
from torch_adapmtl.methods._base import Controller, Method

__all__ = ["Paper", "PaperController"]


# How far above its target a run may end without a warning, as a fraction of the weights. One step
# can exceed the target by less than this.
_ABOVE = 0.01


@dataclass(frozen=True)
class Paper(Method):
    """The paper's mechanism (AdapMTL, arXiv 2408.03913, Section 3, and the authors' code).

    Each component has one trained number s, and its threshold is `alpha = sigmoid(s)`. The
    threshold starts near zero; the optimiser's weight decay pulls s toward 0, which raises the
    threshold. When the overall sparsity reaches the target, the thresholds stop. The weights still
    train: if the threshold is high from the start, most of them can fall below it later. The target
    is missed if s does not rise fast enough. A suitable pair of `start` and `weight_decay` must be
    found for each model and each length of training, which is why this is not the default method.
    `finalize` warns if the target was missed, or exceeded by more than 1 % of the weights.

    With it, `apply_adapmtl` weights the task losses by their stability, as in the paper, unless
    another `weighting` is passed.

    Args:
        start: Initial value of s; the authors suggest -20, for 20,000 steps. At this value the
            threshold should not prune anything.
        weight_decay: Weight decay of s in `Pruner.param_groups`; the authors use 5e-8 to 1e-4.
            Shorter runs need more. With Adam, s moves by up to the learning rate in a step, as long
            as its decay is larger than the gradient of the loss.
        gradient: `"mask"`: pruned weights receive no gradient, as in the paper.
            `"straight_through"`: they do.

    Raises:
        ValueError: If `start` is not finite, `weight_decay` is negative or not finite, or
            `gradient` is another value.
        TypeError: If `start` or `weight_decay` is not a number.

    Example:
        >>> from torch_adapmtl import Paper
        >>> Paper(start=-8.0)
        Paper(start=-8.0, weight_decay=0.0001, gradient='mask')
    """

    start: float = -20.0
    weight_decay: float = 1e-4
    gradient: Literal["straight_through", "mask"] = "mask"

    def __post_init__(self) -> None:
        check_numbers("method: ", start=self.start, weight_decay=self.weight_decay)
        if not math.isfinite(self.start):
            raise ValueError(f"method: start must be finite, got {self.start}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"method: weight_decay must be >= 0 and finite, got {self.weight_decay}"
            )
        check_choice("method: gradient", self.gradient, ("straight_through", "mask"))

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> PaperController:
        """Make the controller."""
        return PaperController(self, layers, target_sparsity, total_steps)


class _SigmoidThreshold(PooledThreshold):
    """alpha = sigmoid(s), with the s of the layer's component."""

    def threshold(self) -> Tensor:
        return self.number.sigmoid()

    def _value(self) -> None:
        return None


class PaperController(Controller):
    """Trains one threshold per component, and stops all of them when the target is reached.

    The controller counts the zeros after every step in one pass over the weights, as the authors'
    code does, but on the device and without waiting for it.

    Args:
        method: The settings.
        layers: The layers.
        target_sparsity: Zeros among all weights of the layers, as a fraction.
        total_steps: Number of steps of the run.

    Attributes:
        s: The trained number of each component.
        stopped: The value of `s` when the target was reached; equal to `s` before.
        reached: Whether the target was reached, bool, 0-d.
    """

    reached: Tensor
    exact = False

    def __init__(
        self, method: Paper, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps)
        self.method = method
        self.threshold_decay = method.weight_decay
        device, start = layers.device, method.start
        self.s = Pooled(layers.component, value=start, device=device, trained=True)
        self.stopped = Pooled(layers.component, value=start, device=device, trained=False)
        self.register_buffer("reached", torch.zeros((), dtype=torch.bool, device=device))
        straight_through = method.gradient == "straight_through"
        for i, layer in enumerate(layers):
            threshold = _SigmoidThreshold(
                self.s, i, straight_through=straight_through, persistent=False
            )
            layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""
        return self.s.by_layer().sigmoid()

    def due(self, step: int) -> bool:
        """Whether the zeros are counted after `step` steps: always."""
        return True

    @torch.no_grad()
    def step(self, step: int, due: bool) -> None:
        """Reset the thresholds if the target has been reached before; count the zeros."""
        s, stopped = self.s.values, self.stopped.values
        s.copy_(torch.where(self.reached, stopped, s))  # the optimiser may have moved it
        stopped.copy_(s)
        pruned = sum(
            zeros if cost == 1 else zeros.double() * cost
            for cost, layer in zip(self.layers.costs, self.layers, strict=True)
            for zeros in [(layer.sparse() == 0).sum()]
        )
        self.reached |= pruned >= self.budget

    def fix(self) -> None:
        """Raise an error, because this method has no exact target.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "fix_zeros() prunes to the target exactly, which method='paper' does not do: call "
            "finalize() to keep the sparsity it has reached"
        )

    def missed(self, sparsity: float) -> str:
        """Explain why the run ended below its target or far above it, with a remedy."""
        if sparsity > self.target_sparsity + _ABOVE:
            return (
                "method='paper' stopped its thresholds when the target was reached, but weights "
                "went on to fall below them. Lower Paper's start, so that fewer are pruned before "
                "they have learned anything, and raise weight_decay, or use method='adaptive'"
            )
        if sparsity >= self.target_sparsity:
            return ""
        if bool(self.reached):
            return (
                "method='paper' stopped its thresholds when the target was reached, and some "
                "weights have grown across them since. Train for fewer steps after that, or use "
                "method='adaptive'"
            )
        return (
            "method='paper' raises its thresholds by the optimizer's weight decay. Make the "
            "optimizer from param_groups(), and raise Paper's start or weight_decay"
        )
