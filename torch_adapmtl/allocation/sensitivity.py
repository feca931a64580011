"""Allocation by sensitivity: the estimated cost of pruning the next weights of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_numbers
from torch_adapmtl._distributed import sum_over_processes
from torch_adapmtl.allocation._base import Allocation, Allocator
from torch_adapmtl.budget.solver import Scores
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.gradient_hooks import GradientHooks
from torch_adapmtl.layers.pooled import Pooled
from torch_adapmtl.layers.sampling import Sample, positions, take

__all__ = ["Sensitivity", "SensitivityAllocation"]


@dataclass(frozen=True)
class SensitivityAllocation(Allocation):
    """Offsets balanced by sensitivity, so that pruning one more weight costs the same everywhere.

    The cost of pruning the next weights of a layer is estimated from the band of weights just above
    its threshold (`alpha < |w| <= 2 * alpha`), by the mean m of their first-order Taylor saliency
    `(w * dL/dw)**2` (Molchanov et al., arXiv 1906.10771). At every update the offset of a layer, or
    component, moves by `-rate / 2 * log(m_layer / m_overall)`, by less if the band holds few
    weights, and stays within `[-bound, bound]`. Offsets are in units of log alpha.

    Args:
        rate: Step size; > 0.
        bound: Largest offset; `exp(bound)` is the largest factor between a layer's threshold and
            the common level; > 0.
        decay: Share of the statistic that remains after each update; in [0, 1).
        prior: Number of weights in the band at which the step is halved; >= 0.

    Raises:
        ValueError: If a number is outside its range.
        TypeError: If an argument is not a number.

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

    def allocator(self, layers: Layers, offsets: Pooled) -> Sensitivity:
        """Make the allocator."""
        return Sensitivity(layers, offsets, self)


class Sensitivity(Allocator):
    """Moves the offsets as described in `SensitivityAllocation`.

    Hooks on the parameters sample the gradients in the step before an update, and do nothing in
    other steps.

    Args:
        layers: The layers.
        offsets: Their offsets, one for each pool.
        settings: The settings.
    """

    saliency: Tensor

    def __init__(self, layers: Layers, offsets: Pooled, settings: SensitivityAllocation) -> None:
        super().__init__()
        self._layers, self._settings = layers, settings
        self._pool = (offsets,)  # in a tuple, so that it is not registered as a submodule
        # Decayed sums of the saliencies in the band and of the number of weights in it.
        self.register_buffer("saliency", torch.zeros(2, len(layers), device=layers.device))
        self._gradients: dict[int, Tensor] = {}
        self._hooks = GradientHooks(layers, self._remember)

    def listen(self, listening: bool) -> None:
        """Start or stop sampling the gradients of backward passes."""
        self._hooks.listen(listening)

    def stop(self) -> None:
        """Remove the hooks from the parameters."""
        self._hooks.remove()
        self._gradients = {}

    def _remember(self, index: int, parameter: nn.Parameter) -> None:
        # Sampled here, because the gradient may have been zeroed when step() is called.
        where = positions(parameter.numel(), self._layers.total, parameter.device)
        assert parameter.grad is not None
        sampled = take(parameter.grad, where)
        # Not a view, because the gradient may be changed in place (zeroed, unscaled, clipped).
        self._gradients[index] = sampled.clone() if where is None else sampled

    def moves(
        self, sample: Sample, magnitudes: Scores, thresholds: Tensor, offsets: Tensor, budget: float
    ) -> Tensor:
        """Add the sampled gradients to the statistic, and return how far each offset moves."""
        self._hooks.note_update("allocation='sensitivity'")
        settings, (pool,) = self._settings, self._pool
        self.saliency.mul_(settings.decay).add_(self._collect(sample, magnitudes.layer, thresholds))
        total, count = self.saliency
        weights = sample.weights.float()
        all_total, all_count = total * weights, count * weights
        ratio = pool.sum(all_total) / pool.sum(all_count) * all_count.sum() / all_total.sum()
        in_band = pool.sum(count)
        trust = in_band / (in_band + settings.prior)
        move = -settings.rate / 2 * ratio.log().clamp(-4.0, 4.0) * trust
        return torch.where(move.isfinite(), move, 0.0)

    def _collect(self, sample: Sample, layer: Tensor, thresholds: Tensor) -> Tensor:
        gradient = torch.zeros_like(sample.values)
        has_gradient = torch.zeros(len(self._layers), dtype=torch.bool)
        for index, part in enumerate(gradient.split(sample.lengths)):
            if index in self._gradients:
                part.copy_(self._gradients[index])
                has_gradient[index] = True
        self._gradients = {}
        values = sample.values
        alpha = thresholds[layer]
        band = (values > alpha) & (values <= 2 * alpha) & has_gradient.to(values.device)[layer]
        new = torch.zeros_like(self.saliency)
        new[0].index_add_(0, layer, (values * gradient).square().masked_fill(~band, 0.0))
        new[1].index_add_(0, layer, band.to(new.dtype))
        if self.synchronize:
            sum_over_processes(new)  # the hooks see the gradients of this process only
        # Not finite in a step that a gradient scaler skips.
        return torch.where(new.isfinite().all(), new, 0.0)
