"""STR: a threshold for each layer, trained with the weights, and cut to the target."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.pooled import Pooled, PooledThreshold
from torch_adapmtl.methods._base import Controller, Method

__all__ = ["STR", "STRController"]


@dataclass(frozen=True)
class STR(Method):
    """STR: soft thresholds that are trained with the weights, one for each layer.

    Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
    arXiv 2002.03231. The threshold of a layer is `sigmoid(s)`, and the model computes with
    `sign(w) max(|w| - sigmoid(s), 0)`. Both the weights and s are trained by the gradient of that
    function: pruned weights receive none, and s receives one from the kept weights. The weight
    decay of s pulls it toward 0, which raises the threshold.

    What differs from the paper: there the sparsity is an outcome of the training. Here it is cut to
    the target when the zeros are fixed. All thresholds are multiplied by one factor, so that they
    would prune exactly what the target asks for, and the weights below them are pruned. The other
    weights keep the values that the model computed with, shrunk by the thresholds as trained, and
    train on without thresholds. If the thresholds had pruned too much, weights that return start
    from the smallest positive number. The sparsity before the cut is in the history; if it was far
    from the target, there is a warning. Weights and s have separate weight decays.

    Make the optimiser from [`Pruner.param_groups`][torch_adapmtl.Pruner.param_groups], which
    includes s. The defaults are those of the authors for a ResNet-50 at 90 % on ImageNet, in
    500,000 steps of SGD with a learning rate of 0.256 and a momentum of 0.875. In a shorter run
    they leave all thresholds at zero until the cut, so that it needs a higher `start` or more
    `weight_decay`.

    Args:
        start: Initial value of s.
        weight_decay: Weight decay of s in `Pruner.param_groups`.
        fix_at: When the sparsity is cut to the target, as a fraction of `total_steps`.

    Raises:
        ValueError: If `start` is not finite, `weight_decay` is negative or not finite, or `fix_at`
            is not in [0, 1].
        TypeError: If an argument is not a number.

    Example:
        >>> from torch_adapmtl import STR
        >>> STR(start=-6.0, weight_decay=0.1)
        STR(start=-6.0, weight_decay=0.1, fix_at=0.9)
    """

    start: float = -3200.0
    weight_decay: float = 2.251757813e-5
    fix_at: float = 0.9

    def __post_init__(self) -> None:
        for name in ("start", "weight_decay", "fix_at"):
            check_numbers("method: ", **{name: getattr(self, name)})
            object.__setattr__(self, name, float(getattr(self, name)))
        if not math.isfinite(self.start):
            raise ValueError(f"method: start must be finite, got {self.start}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"method: weight_decay must be >= 0 and finite, got {self.weight_decay}"
            )
        if not 0.0 <= self.fix_at <= 1.0:
            raise ValueError(
                f"method: fix_at must lie in [0, 1], as a fraction of total_steps; got "
                f"{self.fix_at}"
            )

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> STRController:
        """Make the controller."""
        return STRController(self, layers, target_sparsity, total_steps)


class _LearnedThreshold(PooledThreshold):
    """alpha = sigmoid(s), with the s of the layer; zero once the zeros are fixed."""

    def threshold(self) -> Tensor:
        return self.alpha * self.number.sigmoid()


class STRController(Controller):
    """Trains one threshold for each layer, and cuts the sparsity to the target.

    Args:
        method: The settings.
        layers: The layers.
        target_sparsity: What is to be pruned at the end, as a fraction (see `Controller`).
        total_steps: Number of steps of the run.

    Attributes:
        s: The trained number of each layer.

    Raises:
        ValueError: If initial masks fix more zeros than the target asks for.
    """

    def __init__(
        self, method: STR, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        self.method = method
        super().__init__(layers, target_sparsity, total_steps)
        self.check_initial()
        self.threshold_decay = method.weight_decay
        self.s = Pooled(range(len(layers)), value=method.start, device=layers.device, trained=True)
        for i, layer in enumerate(layers):
            threshold = _LearnedThreshold(self.s, i, 1.0, persistent=False)
            layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)

    def aim(self, target_sparsity: float, total_steps: int) -> None:
        """Set the target, and derive the step at which the zeros are fixed."""
        super().aim(target_sparsity, total_steps)
        self.fix_step = max(1, math.ceil(self.method.fix_at * total_steps))

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,).

        Once the zeros are fixed, it is the threshold before.
        """
        return self.s.by_layer().sigmoid()

    @torch.no_grad()
    def fix(self) -> None:
        """Prune to exactly the target now, by the magnitudes in units of the thresholds."""
        self._compare()
        # In logarithms, because the sigmoid of a very low s is zero. What they have in common does
        # not count, and would take digits.
        logs = F.logsigmoid(self.s.by_layer().double())
        logs = logs - logs.mean()
        least = torch.finfo(torch.float32).min  # above the score of what a mask has pruned
        self.fix_lowest(
            [
                (layer.weight.double().abs().log() - log).float().clamp(min=least)
                for layer, log in zip(self.layers, logs.tolist(), strict=True)
            ]
        )

    def _compare(self) -> None:
        """Warn if the thresholds have pruned far less or far more than the target."""
        reached = self.layers.cost(self.layers.count_zeros()) / self.layers.total_cost
        target = self.budget / self.layers.total_cost
        if reached < target / 2:
            found, remedy = "far less", "raise STR's start or weight_decay"
        elif 1 - reached < (1 - target) / 2:
            found, remedy = "far more", "lower STR's start or weight_decay"
        else:
            return
        warnings.warn(
            f"the thresholds of STR had pruned {reached:.2%} when the sparsity was cut to the "
            f"target of {target:.2%}, {found}, so that the cut chose most of the result: {remedy}, "
            f"and make the optimizer from param_groups()",
            stacklevel=2,
        )

    def refresh(self) -> None:
        """Apply the thresholds, or none if the loaded state has fixed zeros."""
        for layer in self.layers:
            layer.threshold.set_threshold(0.0 if self.fixed else 1.0)
