"""Sensitivity to pruning: what the next weights to go would cost, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl.allocation._base import Allocator
from torch_adapmtl._checks import check_numbers
from torch_adapmtl._distributed import sum_over_processes
from torch_adapmtl.layers.gradient_hooks import GradientHooks
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.layers.sampling import Sample, positions, take

__all__ = ["Sensitivity", "SensitivityAllocation"]


@dataclass(frozen=True)
class SensitivityAllocation:
    """Offsets balanced by sensitivity: pruning one more weight should cost the same everywhere.

    What the next weights to go would cost is read off the weights just above the threshold
    (`alpha < |w| <= 2 alpha`): the mean m of their first-order Taylor saliency `(w * dL/dw)**2`.
    At every update the offset of a layer, or component, moves by
    `-rate / 2 * log(m_layer / m_overall)`, less where few weights were seen, and stays within
    `[-bound, bound]`. Offsets are in units of log alpha.

    Args:
        rate: Step size; > 0.
        bound: Largest offset; `exp(bound)` is the largest factor between a layer's threshold and
            the common level; > 0.
        decay: Share of the statistic kept from one update to the next; in [0, 1).
        prior: Number of weights in the band at which the step is halved; >= 0.

    Raises:
        ValueError: If a number is outside its range.
        TypeError: If one is no number.

    Example:
        >>> from torch_adapmtl import SensitivityAllocation
        >>> SensitivityAllocation(bound=2.3)
        SensitivityAllocation(rate=0.1, bound=2.3, decay=0.9, prior=20.0)
    """

    rate: float = 0.1
    bound: float = 0.35
    decay: float = 0.9
    prior: float = 20.0

    def __post_init__(self) -> None:
        check_numbers("allocation: ", **vars(self))
        if not (0 < self.rate < math.inf and 0 < self.bound < math.inf):
            raise ValueError(
                f"allocation: rate and bound must be > 0 and finite, got rate={self.rate}, "
                f"bound={self.bound}"
            )
        if not (0 <= self.decay < 1 and 0 <= self.prior < math.inf):
            raise ValueError(
                f"allocation: decay must lie in [0, 1) and prior be >= 0, got "
                f"decay={self.decay}, prior={self.prior}"
            )


class Sensitivity(Allocator):
    """Collects the saliency of the weights near the thresholds and says how offsets should move.

    Gradients are sampled by hooks on the parameters, in the one step before an update; the hooks
    do nothing in the others.

    Args:
        layers: The layers, in the model's order.
        options: The settings.
        pool: For each layer the number of the pool of layers that share its offset.

    Attributes:
        synchronize: Whether processes that train together add up what they see.
    """

    saliency: Tensor
    synchronize = True

    def __init__(
        self,
        layers: Sequence[Layer],
        options: SensitivityAllocation,
        pool: Sequence[int],
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.options = options
        self._pool = list(pool)
        # Decayed sum of the saliency in the band above the threshold, and number of weights in it.
        device = layers[0].weight.device
        self.register_buffer("saliency", torch.zeros(2, len(layers), device=device))
        self._total = sum(layer.weight.numel() for layer in layers)
        self._gradients: dict[int, Tensor] = {}
        self._hooks = GradientHooks(self.layers, self._remember)

    def listen(self, listening: bool) -> None:
        """Sample the gradients of the backward passes from now on, or stop to."""
        self._hooks.listen(listening)

    def stop(self) -> None:
        """Take the hooks off the parameters."""
        self._hooks.stop()
        self._gradients = {}

    def _remember(self, index: int, parameter: nn.Parameter) -> None:
        # A sample only, and now: the gradient is gone when step() is called.
        where = positions(parameter.numel(), self._total, parameter.device)
        assert parameter.grad is not None
        taken = take(parameter.grad, where)
        # Not a view: what follows may write to the gradient (zeroing, unscaling, clipping).
        self._gradients[index] = taken.clone() if where is None else taken

    def moves(self, sample: Sample, thresholds: Tensor, offsets: Tensor, zeros: float) -> Tensor:
        """Take in the sampled gradients; say how far each layer's offset should move."""
        options = self.options
        self.saliency.mul_(options.decay).add_(self._collect(sample, thresholds))
        total, count = self.saliency
        device = self.saliency.device
        sizes = torch.tensor([layer.weight.numel() for layer in self.layers], device=device)
        stands_for = sizes / torch.tensor(sample.lengths, device=device)
        all_total, all_count = total * stands_for, count * stands_for
        ratio = (
            self._pooled(all_total) / self._pooled(all_count) * all_count.sum() / all_total.sum()
        )
        seen = self._pooled(count)
        trust = seen / (seen + options.prior)
        move = -options.rate / 2 * ratio.log().clamp(-4.0, 4.0) * trust
        return torch.where(move.isfinite(), move, 0.0)

    def _collect(self, sample: Sample, thresholds: Tensor) -> Tensor:
        gradient = torch.zeros_like(sample.values)
        seen = torch.zeros(len(self.layers), dtype=torch.bool)
        for index, part in enumerate(gradient.split(sample.lengths)):
            if index in self._gradients:
                part.copy_(self._gradients[index])
                seen[index] = True
        self._gradients = {}
        values, layer = sample.values, sample.layer
        alpha = thresholds[layer]
        band = (values > alpha) & (values <= 2 * alpha) & seen.to(values.device)[layer]
        new = torch.zeros_like(self.saliency)
        new[0].index_add_(0, layer, (values * gradient).square().masked_fill(~band, 0.0))
        new[1].index_add_(0, layer, band.to(new.dtype))
        if self.synchronize:
            sum_over_processes(new)  # the gradients were those of this process alone
        return torch.where(new.isfinite().all(), new, 0.0)  # a step that a gradient scaler skips

    def _pooled(self, values: Tensor) -> Tensor:
        """Replace each layer's value by the sum over its pool."""
        pool = torch.tensor(self._pool, device=values.device)
        return torch.zeros_like(values).index_add_(0, pool, values)[pool]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gradients": {}}
