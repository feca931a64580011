"""The default method: one common level that meets the budget, and an offset for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice, check_numbers, check_reach
from torch_adapmtl.allocation._base import Allocation, CommonAllocation
from torch_adapmtl.allocation.gradient import GradientAllocation
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.allocation.sensitivity import SensitivityAllocation
from torch_adapmtl.budget.density import DensityBounds, check_density
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.budget.solver import Bounds, Scores, from_bits, solve
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import count_zeros
from torch_adapmtl.layers.pooled import Pooled, PooledThreshold
from torch_adapmtl.layers.sampling import Sample
from torch_adapmtl.methods._base import Controller, Method
from torch_adapmtl.methods._exact import choose
from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["Adaptive", "AdaptiveController"]

# Default of `position_power`.
_POWER = 0.125
# The largest scale: a threshold just below the largest weight leaves next to nothing.
_LARGEST_SCALE = 20.0
# Magnitudes are summed as integers, in units of the layer's largest over this.
_UNIT = 2.0**40

_ALLOCATIONS: Mapping[str, type[Allocation]] = {
    "lamp": LAMPAllocation,
    "sensitivity": SensitivityAllocation,
    "gradient": GradientAllocation,
    "common": CommonAllocation,
}


@dataclass(frozen=True)
class Adaptive(Method):
    """An exact budget over AdapMTL's soft thresholds; the default of `apply_adapmtl`.

    The threshold of a layer is a common level times `exp(offset)`, with an offset for each layer.
    The level is solved at each update so that the overall sparsity follows its schedule, and the
    run ends at exactly the target. In the paper (arXiv 2408.03913) each component trains one
    threshold, and the sparsity is what results; [`Paper`][torch_adapmtl.Paper] is that mechanism.

    Args:
        schedule: How the sparsity rises.
        granularity: One offset for each `"layer"`, or for each `"component"` as in the paper.
        allocation: What moves the offsets. `"lamp"`: the contribution of each layer's weights to
            its output. `"sensitivity"`: the estimated cost of pruning for the loss. `"gradient"`:
            the gradient of the loss, as in the paper. `"common"`: nothing, so that all layers have
            the same threshold. Or an instance of [`LAMPAllocation`][torch_adapmtl.LAMPAllocation],
            [`SensitivityAllocation`][torch_adapmtl.SensitivityAllocation] or
            [`GradientAllocation`][torch_adapmtl.GradientAllocation].
        gradient: `"straight_through"`: pruned weights receive gradients until the schedule's
            `regrow_until`. `"mask"`: pruned weights never receive gradients, as in the paper.
        reach: If None, the remaining weights are shrunk by the threshold, and those of a layer
            multiplied by a common factor, at most 20, that would keep the sum of their magnitudes;
            but no weight is multiplied by more than 15/8. The factor is renewed when the thresholds
            move.
            A number: the magnitude at which the shrinkage ends, in units of the threshold, without
            a factor; `math.inf` for the paper's soft threshold. See
            [`soft_threshold`][torch_adapmtl.soft_threshold].
        min_density: Smallest share of nonzero weights in a component, as a fraction: one number for
            all components, or a mapping by component. Independently of it, each layer keeps at
            least a tenth of the overall density, and a layer with few weights keeps more.
        max_density: Largest share of nonzero weights in a component, in the same form. With
            `count="macs"`, these two are shares of the multiply-adds that are left.
        position_power: Only with `count="macs"`: the threshold of a layer grows with this power of
            its positions, so that more is pruned where a zero saves more; in [0, 1]. If None, it
            is 0.125.

    Raises:
        ValueError: If an argument is out of range. Also in `apply_adapmtl`, if the bounds make the
            target impossible.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from torch_adapmtl import Adaptive, SparsitySchedule
        >>> method = Adaptive(schedule=SparsitySchedule(end=0.35), allocation="common")
        >>> method.reach, method.granularity
        (None, 'layer')
    """

    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)
    granularity: Literal["layer", "component"] = "layer"
    allocation: Allocation | Literal["lamp", "sensitivity", "gradient", "common"] = "lamp"
    gradient: Literal["straight_through", "mask"] = "straight_through"
    reach: float | None = None
    min_density: float | Mapping[str, float] | None = None
    max_density: float | Mapping[str, float] | None = None
    position_power: float | None = None

    def __post_init__(self) -> None:
        if self.position_power is not None:
            check_numbers(position_power=self.position_power)
            if not 0 <= self.position_power <= 1:
                raise ValueError(f"position_power must lie in [0, 1], got {self.position_power}")
            object.__setattr__(self, "position_power", float(self.position_power))
        check_schedule(self.schedule)
        check_choice("granularity", self.granularity, ("layer", "component"))
        if not isinstance(self.allocation, Allocation):
            check_choice("allocation", self.allocation, tuple(_ALLOCATIONS))
            # An object, so that methods that behave alike are equal.
            object.__setattr__(self, "allocation", _ALLOCATIONS[self.allocation]())
        check_choice("gradient", self.gradient, ("straight_through", "mask"))
        if self.reach is not None:
            check_reach(self.reach)
            object.__setattr__(self, "reach", float(self.reach))
        for name in ("min_density", "max_density"):
            density = getattr(self, name)
            check_density(name, density)
            if isinstance(density, Mapping):
                object.__setattr__(self, name, dict(density))  # a copy of the caller's

    def config(self) -> dict[str, Any]:
        """Return the settings, without those that have no effect."""
        config = super().config()
        if self.gradient == "mask":
            del config["schedule"]["regrow_until"]
        if self.position_power is None:
            del config["position_power"]
        for name, unbounded in (("min_density", 0.0), ("max_density", 1.0)):
            if isinstance(density := config[name], dict):
                bounds = {c: d for c, d in density.items() if d not in (None, unbounded)}
                config[name] = bounds or None
            elif density == unbounded:
                config[name] = None
        return config

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> AdaptiveController:
        """Make the controller."""
        return AdaptiveController(self, layers, target_sparsity, total_steps)


class _OffsetThreshold(PooledThreshold):
    """alpha = level * exp(offset), with an offset that the gradient of the loss trains."""

    def threshold(self) -> Tensor:
        return self.alpha * self.number.exp()


class AdaptiveController(Controller):
    """Keeps the overall sparsity on its schedule, and distributes it over the layers.

    Args:
        method: The settings.
        layers: The layers.
        target_sparsity: What is to be pruned at the end, as a fraction (see `Controller`).
        total_steps: Number of steps of the run.

    Attributes:
        level: The level of each layer, (L,): the common level, or a lower or higher one where a
            bound applies.
        tilt: The factor of each layer's threshold that grows with its positions, (L,).
        scale: What the remaining weights of each layer are multiplied by, (L,); 1 if the method has
            a `reach`.
        offsets: The offsets, one for each pool of layers that share it, in units of log alpha.

    Raises:
        ValueError: If the bounds make the target impossible; the error shows the numbers.
    """

    level: Tensor
    tilt: Tensor
    scale: Tensor

    def __init__(
        self, method: Adaptive, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        assert isinstance(method.allocation, Allocation)
        self.method, self.allocation = method, method.allocation
        if method.position_power is not None and layers.counts == "weights":
            raise ValueError(
                f"position_power={method.position_power} has no effect if weights are counted: "
                f"pass count='macs', or leave it out"
            )
        super().__init__(layers, target_sparsity, total_steps)
        self.shardable = self.allocation.shardable
        self._bound(layers.initial_zeros, target_sparsity)
        share = layers.cost(self._density.masked) / layers.total_cost
        self.initial = max(min(method.schedule.initial, target_sparsity), share)

        self.register_buffer("level", torch.zeros(len(layers), device=layers.device))
        self.register_buffer("scale", torch.ones(len(layers), device=layers.device))
        self.register_buffer("tilt", self._tilt().to(layers.device), persistent=False)
        pool = layers.component if method.granularity == "component" else range(len(layers))
        trained = self.allocation.trained
        self.offsets = Pooled(pool, device=layers.device, trained=trained)
        options: dict[str, Any] = {
            "reach": math.inf if method.reach is None else method.reach,
            "straight_through": method.gradient == "straight_through",
            "persistent": False,
        }
        for i, layer in enumerate(layers):
            threshold = (
                _OffsetThreshold(self.offsets, i, **options)
                if trained
                else SoftThreshold(0.0, **options)
            )
            layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)
        self.allocator = self.allocation.allocator(layers, self.offsets)

    def aim(self, target_sparsity: float, total_steps: int) -> None:
        """Set the target, and derive the step at which the zeros are fixed."""
        super().aim(target_sparsity, total_steps)
        self.fix_step = self.method.schedule.fix_step(total_steps)

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,).

        Once the zeros are fixed, these are the thresholds of the last update.
        """
        return self.level * self.tilt * self.offsets.by_layer().exp()

    # --- in the course of the run -----------------------------------------------------------------

    def prepare(self, step: int, due: bool) -> None:
        """Switch the gradients of pruned weights and the gradient hooks of the allocator."""
        method = self.method
        regrow = method.gradient == "straight_through" and method.schedule.regrows(
            step, self.total_steps, self.target_sparsity
        )
        if self.layers[0].threshold.straight_through != regrow:
            for layer in self.layers:
                layer.threshold.straight_through = regrow
        if self.allocator is not None and not self.fixed:
            self.allocator.listen(due)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the offsets, then solve for the level that meets the schedule."""
        schedule = self.method.schedule
        sparsity = schedule(step, self.total_steps, self.target_sparsity, self.initial)
        budget = sparsity * self.layers.total_cost
        sample = Sample.draw(self.layers)
        magnitudes = Scores(sample.values, sample.lengths, sample.weights)
        offsets = self.offsets.by_layer()
        if self.allocator is not None:
            thresholds = self.thresholds()
            moves = self.allocator.moves(sample, magnitudes, thresholds, offsets, budget)
            offsets = offsets + self._mobility(step) * moves
        self._set_offsets(offsets)
        self.level.copy_(from_bits(self._solve(magnitudes.scaled(self._factors()), budget)))
        if self.method.reach is None:
            shares = shares_kept(magnitudes, self.thresholds())
            self.scale.copy_(shares.reciprocal().clamp(1.0, _LARGEST_SCALE))
        self._set_thresholds()

    def _mobility(self, step: int) -> float:
        """The factor of the offsets' moves: 1, and falling to 0 after the end of the schedule.

        A threshold that moves changes the output of its layer, and weights cannot adapt to that
        once their learning rate has decayed.
        """
        end = self.method.schedule.end_at(self.target_sparsity) * self.total_steps
        return min(1.0, (self.fix_step - step) / max(self.fix_step - end, 1.0))

    def _set_offsets(self, offsets: Tensor) -> None:
        # An offset that training has made NaN is set to 0.
        bound = self.allocation.bound
        self.offsets.assign(offsets.nan_to_num(0.0).clamp(-bound, bound))

    def _factors(self) -> Tensor:
        """The factor of each layer, (L,): a score is the magnitude times the factor."""
        return self.offsets.by_layer().neg().exp() / self.tilt

    def _tilt(self) -> Tensor:
        log = torch.tensor(self.layers.costs, dtype=torch.float64).log()
        power = self.method.position_power
        return ((_POWER if power is None else power) * (log - log.mean())).exp().float()

    def _solve(self, scores: Scores, budget: float) -> Tensor:
        wanted = torch.tensor(budget, dtype=torch.float64, device=self.level.device)
        return solve(scores, self._bounds(budget), wanted)

    def _set_thresholds(self) -> None:
        """Write the thresholds into the layers, after an update."""
        alphas = self.level * self.tilt if self.allocation.trained else self.thresholds()
        both = torch.stack([alphas, self.scale]).tolist()
        for layer, alpha, scale in zip(self.layers, *both, strict=True):
            value = 0.0 if self.fixed else min(alpha, torch.finfo(layer.weight.dtype).max)
            layer.threshold.set_threshold(value)
            if self.method.reach is None:
                layer.threshold.set_scale(1.0 if self.fixed else scale)

    # --- bounds -----------------------------------------------------------------------------------

    def _bound(self, masked: list[int], target_sparsity: float) -> None:
        method = self.method
        self._density = DensityBounds(
            self.layers, masked, target_sparsity, method.min_density, method.max_density
        )

    def _bounds(self, budget: float) -> Bounds:
        """The bounds while `budget` is to be pruned."""
        density, method = self._density, self.method
        # While the sparsity falls to the target, the floors follow the present density.
        if budget > density.budget:
            density = DensityBounds(
                self.layers,
                density.masked,
                budget / self.layers.total_cost,
                method.min_density,
                method.max_density,
            )
        return density.at(budget, self.level.device)

    # --- fixing the zeros, another target, a loaded state -----------------------------------------

    @torch.no_grad()
    def fix(self) -> None:
        """Write the sparse weights into the parameters, and fix the exact number of zeros by masks.

        The remaining weights are shrunk by the thresholds of the last update; only the choice of
        zeros becomes exact. So the model's output hardly changes at this step.
        """
        self._set_offsets(self.offsets.by_layer())
        budget = self._density.budget
        self.fix_zeros(choose(self.layers, self._factors(), self._bounds(budget), budget))
        if self.allocator is not None:
            self.allocator.stop()

    def retarget(self, target_sparsity: float, total_steps: int, zeros: Sequence[int]) -> None:
        """Start a new run, from the present `zeros` of each layer to another target.

        If the target is higher, fixed zeros stay zero. If it is lower, pruned weights may become
        nonzero again, except those that were zero when the first run began.

        Raises:
            ValueError: If the bounds make the target impossible; nothing is changed then.
        """
        pruned, budget = self.layers.cost(zeros), self.layers.budget(target_sparsity)
        rising = budget >= pruned or self.layers.meets(zeros, budget)
        masks = [layer.mask if rising else layer.initial_mask for layer in self.layers]
        self._bound([count_zeros(mask) for mask in masks], target_sparsity)
        if self.fixed:
            self.write()  # the optimiser may have moved parameters under the masks
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.threshold.mask = None if mask is None else mask.to(layer.weight.device)
        self.aim(target_sparsity, total_steps)
        self.initial, self.fixed = pruned / self.layers.total_cost, False
        self.update(0)

    def refresh(self) -> None:
        """Set thresholds and bounds from the loaded state."""
        if not self.fixed:  # the masks are the initial ones, whose zeros count in the bounds
            masked = [count_zeros(layer.mask) for layer in self.layers]
            self._bound(masked, self.target_sparsity)
        self._set_thresholds()


def shares_kept(magnitudes: Scores, thresholds: Tensor) -> Tensor:
    """What the soft threshold leaves of the magnitudes of the weights above it, as a fraction.

    Args:
        magnitudes: The magnitudes of the layers' weights, or of a sample of them.
        thresholds: The threshold of each layer, (L,).

    Returns:
        For each layer, float32 of shape (L,); 1 where no weight is above the threshold.
    """
    layer, values = magnitudes.layer, magnitudes.values
    # An infinite weight, which has the score of the largest number, would make all others count
    # for nothing.
    above = (values > thresholds[layer]) & (values < torch.finfo(torch.float32).max)
    before = values.where(above, 0.0)
    largest = torch.zeros_like(thresholds).scatter_reduce_(0, layer, before, "amax")
    # Sums of integers are exact, and do not depend on the order.
    whole = (before / largest[layer].double() * _UNIT).nan_to_num(0.0).long()
    sums = torch.zeros_like(thresholds, dtype=torch.long).index_add_(0, layer, whole)
    counts = torch.zeros_like(sums).index_add_(0, layer, above.long())
    mean = sums / counts.double() / _UNIT * largest
    return (1.0 - thresholds / mean).nan_to_num(1.0).clamp(0.0, 1.0).float()
