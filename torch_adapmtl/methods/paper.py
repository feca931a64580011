"""The authors' own mechanism: one sigmoid threshold a component, raised by weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.methods._base import Controller, Mode
from torch_adapmtl.layers.layer import Layer, PerComponent, members
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = ["PaperBudget", "PaperMode"]


# How far above its target a run may end, as a fraction of the weights: more than a step makes.
_ABOVE = 0.01


@dataclass(frozen=True)
class PaperMode(Mode):
    """Settings of the paper's mechanism (AdapMTL, arXiv 2408.03913, and the authors' code).

    Each component has one trained number s and the threshold `alpha = sigmoid(s)`. It starts low;
    the optimiser's weight decay pulls s toward 0, which raises the threshold. When the overall
    sparsity reaches the target, the thresholds stay as they are; the weights do not, and with a
    threshold that is high from the start most of them can follow each other below it. The target is
    missed if s does not rise fast enough: the pair of `start` and `weight_decay` has to be found
    for each model and length of training, which is why it is not the default mode. `finalize` warns
    of a target that was missed, or passed by more than a percent.

    Args:
        start: Initial value of s; the authors suggest -20, for 20,000 steps. It should prune
            nothing yet.
        weight_decay: Weight decay of s in `AdapMTL.param_groups`; the authors use 5e-8 to 1e-4.
            Shorter runs need more: with Adam s moves by up to the learning rate in a step, as far
            as its decay outweighs the gradient of the loss.

    Raises:
        ValueError: If `start` is not finite or `weight_decay` is negative.
        TypeError: If one is no number.

    Example:
        >>> from torch_adapmtl import PaperMode
        >>> PaperMode(start=-8.0)
        PaperMode(start=-8.0, weight_decay=0.0001)
    """

    start: float = -20.0
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_numbers("mode: ", **vars(self))
        if not math.isfinite(self.start):
            raise ValueError(f"mode: start must be finite, got {self.start}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"mode: weight_decay must be >= 0 and finite, got {self.weight_decay}")

    def controller(
        self,
        layers: Sequence[Layer],
        model: nn.Module,
        *,
        target: float,
        total_steps: int,
        straight_through: bool = False,
    ) -> PaperBudget:
        """Make the controller; see `PaperBudget`."""
        return PaperBudget(
            layers,
            target=target,
            total_steps=total_steps,
            mode=self,
            straight_through=straight_through,
        )


class _SigmoidThreshold(SoftThreshold):
    """alpha = sigmoid(s), with the s of the layer's component."""

    def __init__(self, scores: PerComponent, component: str, **options: Any) -> None:
        super().__init__(0.0, **options)
        self._source = (scores, component)  # in a tuple: not a submodule of its own

    def threshold(self) -> Tensor:
        scores, component = self._source
        return scores[component].sigmoid()

    def _value(self) -> None:
        return None


class PaperBudget(Controller):
    """Trains one threshold a component and holds them all once the target is reached.

    The sparsity is counted after every step, on the device and without waiting for it; that is one
    pass over the weights, as in the authors' code.

    Args:
        layers: The layers, in the model's order; their thresholds are made here.
        target: Zeros among all weights of the layers, as a fraction.
        total_steps: Number of steps.
        mode: The settings.
        straight_through: Whether pruned weights keep learning; the paper's do not.
    """

    reached: Tensor
    exact = False
    allocates = True

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        mode: PaperMode,
        straight_through: bool,
    ) -> None:
        super().__init__(layers, target, total_steps)
        self.threshold_decay = mode.weight_decay
        device = layers[0].weight.device
        names = list(members(layers))
        start = torch.full((), float(mode.start), device=device)
        self.s = PerComponent({name: nn.Parameter(start.clone()) for name in names})
        # What s was when the target was reached; the optimiser may move s, step() moves it back.
        self.held = PerComponent({name: start.clone() for name in names})
        self.register_buffer("reached", torch.zeros((), dtype=torch.bool, device=device))
        for layer in layers:
            threshold = _SigmoidThreshold(
                self.s, layer.component, straight_through=straight_through, persistent=False
            )
            layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""
        return torch.stack([self.s[layer.component].detach().sigmoid() for layer in self.layers])

    def due(self, step: int) -> bool:
        """Whether the weights are looked at after `step` steps: always."""
        return True

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Hold the thresholds if the target was reached before; count the zeros."""
        for name in members(self.layers):
            s, held = self.s[name], self.held[name]
            s.copy_(torch.where(self.reached, held, s))
            held.copy_(s)
        zeros = sum((layer.sparse() == 0).sum() for layer in self.layers)
        self.reached |= zeros >= self.zeros

    def freeze(self) -> None:
        """Refuse: the thresholds decide on the sparsity.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "freeze() prunes to the target exactly, which mode='paper' does not do: call "
            "finalize() to keep the sparsity it has reached"
        )

    def missed(self, sparsity: float) -> str:
        """Why the run ended below its target or well above it, and what to do about it."""
        if sparsity > self.target + _ABOVE:
            return (
                "mode='paper' held its thresholds when the target was reached, but weights went on "
                "to fall below them. Lower PaperMode's start, so that fewer are gone before they "
                "have learned anything, and raise weight_decay, or use mode='adaptive'"
            )
        if sparsity >= self.target:
            return ""
        if bool(self.reached):
            return (
                "mode='paper' held its thresholds when the target was reached, and some weights "
                "have grown across them since. Train for fewer steps after that, or use "
                "mode='adaptive'"
            )
        return (
            "mode='paper' raises its thresholds by the optimizer's weight decay. Make the "
            "optimizer from param_groups(), and raise PaperMode's start or weight_decay"
        )
