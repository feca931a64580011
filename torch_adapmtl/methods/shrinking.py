"""Baselines that shrink the remaining weights by one global threshold: ST-3 and Feather."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.budget.solver import Scores, bisect, from_bits
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.sampling import Sample
from torch_adapmtl.methods._base import Controller, Method
from torch_adapmtl.methods._lowest import lowest, open_score
from torch_adapmtl.tensor.shapes import PowerThreshold, RescaledThreshold
from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["ST3", "Feather", "ShrinkingController"]


def _schedule() -> SparsitySchedule:
    return SparsitySchedule(start=0.0, end=0.5, fix_at=1.0)


class ShrinkingMethod(Method):
    """A method whose threshold, one for all weights, is a quantile of their magnitudes."""

    schedule: SparsitySchedule

    #: How the sparse weight depends on the threshold; `plain_state_dict` reads it.
    shape: str

    @abstractmethod
    def threshold(self, target_sparsity: float) -> SoftThreshold:
        """Make the threshold of a layer."""

    def config(self) -> dict[str, Any]:
        """Return the settings, without the one of the schedule that has no effect."""
        config = super().config()
        del config["schedule"]["regrow_until"]
        return {**config, "shape": self.shape}

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> ShrinkingController:
        """Make the controller."""
        return ShrinkingController(
            layers,
            target_sparsity,
            total_steps,
            self.schedule,
            lambda: self.threshold(target_sparsity),
        )


@dataclass(frozen=True)
class ST3(ShrinkingMethod):
    """ST-3: straight-through gradients, a soft threshold and rescaled channels.

    Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all
    you need for Sparse Training?", WACV 2023, arXiv 2212.01076. One threshold t for all weights is
    the quantile of their magnitudes that a cubic schedule asks for. The model computes with
    `sign(w) max(|w| - t, 0)`, and each output channel is multiplied by `1.01 / (r + 0.01)`, where r
    is the share of its magnitude that its kept weights have, before they are shrunk: the sum of
    `|w|` over the kept weights by the sum over all (1e-6 is added to both means, as in the authors'
    code). The gradient of the sparse weight passes whole to all weights, also to pruned ones, which
    can return; the factor has no part in it.

    What differs from the paper: the threshold is moved every few steps and not in each one, in a
    large model by the quantile of a sample of its weights. The channels are those of the weight's
    first dimension; in a transposed convolution these are the input channels. When the zeros are
    fixed, which is at the end by default, the threshold is moved to exactly the quantile of the
    target, and what the model computes with is written into the weights. The cubic rise takes the
    first half of the run by default. The variant that normalises magnitudes by layer (ST-3 sigma)
    is not there.

    Args:
        schedule: How the sparsity rises, and when the zeros are fixed.

    Raises:
        TypeError: If `schedule` is not a `SparsitySchedule`.

    Example:
        >>> from torch_adapmtl import ST3
        >>> ST3().schedule.end, ST3().schedule.fix_at
        (0.5, 1.0)
    """

    shape = "rescaled"

    schedule: SparsitySchedule = field(default_factory=_schedule)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)

    def threshold(self, target_sparsity: float) -> SoftThreshold:
        """Make the threshold of a layer."""
        return RescaledThreshold(0.0, persistent=False)


@dataclass(frozen=True)
class Feather(ShrinkingMethod):
    """Feather: a threshold between soft and hard, and scaled gradients of pruned weights.

    Glentis Georgoulakis, Retsinas and Maragos, "Feather: An Elegant Solution to Effective DNN
    Sparsification", BMVC 2023, arXiv 2310.02448. One threshold t for all weights is the quantile of
    their magnitudes that a cubic schedule asks for. The model computes with
    `sign(w) (|w|^p - t^p)^(1/p)` where `|w|` is above t, and with zero elsewhere. The gradient of
    the sparse weight passes whole to kept weights, and times theta to pruned ones.

    What differs from the paper: the threshold is moved every few steps and not in each one, in a
    large model by the quantile of a sample of its weights. When the zeros are fixed, which is at
    the end by default, the threshold is moved to exactly the quantile of the target, and what the
    model computes with is written into the weights (the authors' code writes the weights before
    they are shrunk).

    Args:
        power: p; at least 1. With 1 the threshold is soft, and the larger, the less the remaining
            weights are shrunk.
        theta: Factor of the gradients of pruned weights, in [0, 1]. If None, it is 1 up to a target
            of 95 %, and 0.5 above, as in the authors' code.
        schedule: How the sparsity rises, and when the zeros are fixed.

    Raises:
        ValueError: If `power` or `theta` is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from torch_adapmtl import Feather
        >>> Feather(theta=0.5).power
        3.0
    """

    shape = "power"

    power: float = 3.0
    theta: float | None = None
    schedule: SparsitySchedule = field(default_factory=_schedule)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_numbers("method: ", power=self.power)
        if not 1.0 <= self.power < math.inf:
            raise ValueError(f"method: power must be >= 1 and finite, got {self.power}")
        object.__setattr__(self, "power", float(self.power))
        if self.theta is not None:
            check_numbers("method: ", theta=self.theta)
            if not 0.0 <= self.theta <= 1.0:
                raise ValueError(
                    f"method: theta must lie in [0, 1], or be None to follow the target, got "
                    f"{self.theta}"
                )
            object.__setattr__(self, "theta", float(self.theta))

    def threshold(self, target_sparsity: float) -> SoftThreshold:
        """Make the threshold of a layer."""
        theta = self.theta
        if theta is None:
            theta = 0.5 if target_sparsity > 0.95 else 1.0
        return PowerThreshold(self.power, theta, persistent=False)


class ShrinkingController(Controller):
    """Keeps one threshold for all weights at the quantile that a schedule asks for.

    Args:
        layers: The layers.
        target_sparsity: What is to be pruned at the end, as a fraction (see `Controller`).
        total_steps: Number of steps of the run.
        schedule: How the sparsity rises.
        make: Makes the threshold of a layer, with a value of zero.

    Attributes:
        level: The threshold, 0-d.

    Raises:
        ValueError: If initial masks fix more zeros than the target asks for.
    """

    level: Tensor

    def __init__(
        self,
        layers: Layers,
        target_sparsity: float,
        total_steps: int,
        schedule: SparsitySchedule,
        make: Callable[[], SoftThreshold],
    ) -> None:
        self.schedule = schedule
        super().__init__(layers, target_sparsity, total_steps)
        self.check_initial()
        self.initial = min(schedule.initial, target_sparsity)
        self.register_buffer("level", torch.zeros((), device=layers.device))
        for layer in layers:
            layer.threshold = make().to(layer.weight.device, layer.weight.dtype)

    def aim(self, target_sparsity: float, total_steps: int) -> None:
        """Set the target, and derive the step at which the zeros are fixed."""
        super().aim(target_sparsity, total_steps)
        self.fix_step = self.schedule.fix_step(total_steps)

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,).

        Once the zeros are fixed, it is the threshold that they were fixed with.
        """
        return self.level.repeat(len(self.layers))

    def _pruned(self, budget: float) -> float:
        """The budget, or what initial masks prune already if that is more."""
        return max(budget, self.layers.cost(self.layers.initial_zeros))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the threshold to the quantile of the schedule after `step` steps."""
        sparsity = self.schedule(step, self.total_steps, self.target_sparsity, self.initial)
        budget = self._pruned(sparsity * self.layers.total_cost)
        sample = Sample.draw(self.layers)
        scores = Scores(sample.values, sample.lengths, sample.weights)
        costs = torch.tensor(self.layers.costs, dtype=torch.float64, device=self.level.device)

        def cost(level: Tensor) -> Tensor:
            counts = scores.count(level.unsqueeze(-1).expand(*level.shape, len(costs)))
            return (counts * costs).sum(-1)

        wanted = torch.tensor(budget, dtype=torch.float64, device=self.level.device)
        self.level.copy_(from_bits(bisect(cost, wanted)))
        self._set_thresholds()

    @torch.no_grad()
    def fix(self) -> None:
        """Move the threshold to exactly the target, write the sparse weights, and fix the zeros."""
        scores = [open_score(layer.weight.abs(), layer) for layer in self.layers]
        pruned = lowest(scores, self._pruned(self.budget), self.layers.costs)
        # The largest magnitude that is pruned, so that the threshold prunes what the masks do.
        self.level.zero_()
        for score, flat in zip(scores, pruned, strict=True):
            largest = score.masked_fill(~flat, 0.0).nan_to_num(0.0, neginf=0.0).amax()
            self.level.copy_(torch.maximum(self.level, largest.to(self.level.device)))
        self._set_thresholds()
        self.fix_zeros([~flat for flat in pruned])

    def _set_thresholds(self) -> None:
        level = 0.0 if self.fixed else float(self.level)
        for layer in self.layers:
            layer.threshold.set_threshold(min(level, torch.finfo(layer.weight.dtype).max))

    def refresh(self) -> None:
        """Set the thresholds from the loaded state."""
        self._set_thresholds()
