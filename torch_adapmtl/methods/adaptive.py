"""The adaptive controller: one level for the budget, an offset for every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_adapmtl.allocation._base import Allocator
from torch_adapmtl._checks import check_numbers
from torch_adapmtl.methods._base import Controller
from torch_adapmtl.budget.density import DensityBounds
from torch_adapmtl.layers.layer import Layer, PerComponent, count_gone, members
from torch_adapmtl.layers.sampling import Sample, magnitude
from torch_adapmtl.budget.solver import Bounds, Scores, SparsitySchedule, from_bits, pruned, select, solve, to_bits
from torch_adapmtl.allocation.lamp import LAMP, LAMPAllocation
from torch_adapmtl.allocation.sensitivity import Sensitivity, SensitivityAllocation
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = ["AdaptiveBudget", "GradientAllocation"]


@dataclass(frozen=True)
class GradientAllocation:
    """Offsets trained by the task gradient, through the thresholds: the paper's way.

    The budget still holds the overall sparsity; the gradient decides who bears it.

    Args:
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If `bound` is not positive.
        TypeError: If it is no number.

    Example:
        >>> from torch_adapmtl import GradientAllocation
        >>> GradientAllocation()
        GradientAllocation(bound=2.3)
    """

    bound: float = 2.3

    def __post_init__(self) -> None:
        check_numbers("allocation: ", bound=self.bound)
        if not 0 < self.bound < math.inf:
            raise ValueError(f"allocation: bound must be > 0 and finite, got {self.bound}")


Allocation: TypeAlias = LAMPAllocation | SensitivityAllocation | GradientAllocation


class _OffsetThreshold(SoftThreshold):
    """alpha = level * exp(offset), with an offset that the task gradient trains."""

    def __init__(self, offsets: PerComponent, component: str, index: int, **options: Any) -> None:
        super().__init__(0.0, **options)
        self._source = (offsets, component, index)  # in a tuple: not a submodule of its own

    def threshold(self) -> Tensor:
        offsets, component, index = self._source
        offset = offsets[component]
        return self.alpha * (offset[index] if offset.ndim else offset).exp()

    def _value(self) -> float | None:
        value = super()._value()
        return value if value == 0.0 else None


class AdaptiveBudget(Controller):
    """Keeps the overall sparsity on its schedule and shares it out between the layers.

    Args:
        layers: The layers, in the model's order; their thresholds are made here.
        target: Zeros among all weights of the layers at the end, as a fraction.
        total_steps: Number of steps.
        schedule: How the sparsity gets there.
        granularity: One offset per `"layer"` or per `"component"`.
        allocation: What moves the offsets; None for one common threshold.
        straight_through: Whether pruned weights keep learning.
        reach: Where the shrinkage ends, see `soft_threshold`.
        min_density: Least density of a component, as a fraction; one for all, or by name.
        max_density: The same for the largest.

    Raises:
        ValueError: If the bounds leave no room for the target; with the arithmetic.
    """

    level: Tensor

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        schedule: SparsitySchedule,
        granularity: Literal["layer", "component"],
        allocation: Allocation | None,
        straight_through: bool,
        reach: float = math.inf,
        min_density: float | Mapping[str, float] | None = None,
        max_density: float | Mapping[str, float] | None = None,
    ) -> None:
        self.schedule, self.allocation = schedule, allocation
        self.straight_through = straight_through
        self._densities = min_density, max_density
        # Gradients are reduced before anything could look at them.
        self.shardable = allocation is None or isinstance(allocation, LAMPAllocation)
        super().__init__(layers, target, total_steps)
        self.allocates = allocation is not None and min_density is None and max_density is None
        self._bound([layer.masked for layer in layers], target)
        share = sum(self._density.masked) / sum(self._sizes)
        self.initial = max(min(schedule.initial, target), share)
        self._members = members(layers)

        device = layers[0].weight.device
        self.register_buffer("level", torch.zeros(len(layers), device=device))
        learned = isinstance(allocation, GradientAllocation)
        offsets = {}
        for name, indices in self._members.items():
            offset = torch.zeros((len(indices),) if granularity == "layer" else (), device=device)
            offsets[name] = nn.Parameter(offset) if learned else offset
        self.offset = PerComponent(offsets)
        options: dict[str, Any] = {
            "reach": reach, "straight_through": straight_through, "persistent": False
        }  # fmt: skip
        for name, indices in self._members.items():
            for position, i in enumerate(indices):
                threshold = (
                    _OffsetThreshold(self.offset, name, position, **options)
                    if learned
                    else SoftThreshold(0.0, **options)
                )
                weight = layers[i].weight
                layers[i].threshold = threshold.to(weight.device, weight.dtype)

        names = list(self._members)
        by_component = [names.index(layer.component) for layer in layers]
        pool = by_component if granularity == "component" else range(len(layers))
        self.allocator: Allocator | None = None
        if isinstance(allocation, SensitivityAllocation):
            self.allocator = Sensitivity(layers, allocation, pool)
        elif isinstance(allocation, LAMPAllocation):
            self.allocator = LAMP(layers, allocation, pool)

    def _aim(self, target: float, total_steps: int) -> None:
        super()._aim(target, total_steps)
        self.last_update = self.schedule.last_update(total_steps)

    # --- offsets --------------------------------------------------------------------------------

    def offsets(self) -> Tensor:
        """The offset of each layer, in units of log alpha, float32 of shape (L,); detached."""
        offset = torch.zeros_like(self.level)
        for name, indices in self._members.items():
            offset[indices] = self.offset[name].detach().to(offset.dtype)
        return offset

    def _set_offsets(self, offset: Tensor) -> None:
        if self.allocation is None:
            return
        # An offset that the gradient has thrown out of all numbers starts anew.
        offset = offset.nan_to_num(0.0).clamp(-self.allocation.bound, self.allocation.bound)
        for name, indices in self._members.items():
            own = self.offset[name]
            own.copy_(offset[indices] if own.ndim else offset[indices[0]])

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,).

        Once the zeros are held by masks, the thresholds of the last update.
        """
        return self.level * self.offsets().exp()

    # --- the rare update ------------------------------------------------------------------------

    def wake(self, step: int) -> None:
        """Be ready for the gradients of the step after `step`."""
        self.asleep = False
        learn = self.straight_through and self.schedule.regrows(step, self.total_steps)
        if self.layers[0].threshold.straight_through != learn:
            for layer in self.layers:
                layer.threshold.straight_through = learn
        if self.allocator is not None and not self.frozen:
            self.allocator.listen(self.due(step + 1))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the offsets, then solve for the level that meets the schedule."""
        sample = Sample.draw(self.layers, self.level.device)
        offsets = self.offsets()
        share = self.schedule(step, self.total_steps, self.target, self.initial)
        zeros = share * sum(self._sizes)
        if self.allocator is not None:
            moves = self.allocator.moves(sample, self.thresholds(), offsets, zeros)
            offsets = offsets + self._mobility(step) * moves
        self._set_offsets(offsets)
        self.level.copy_(from_bits(self._solve(self._scores(sample), zeros)))
        self._hand_out()

    def _mobility(self, step: int) -> float:
        """How far offsets may still move: all the way, then ever less from the schedule's end on.

        A moving threshold shifts what its layer computes, and weights whose learning rate has
        decayed cannot follow.
        """
        end = self.schedule.end * self.total_steps
        return min(1.0, (self.last_update - step) / max(self.last_update - end, 1.0))

    def _hand_out(self) -> None:
        """Hand every layer its threshold, after an update."""
        learned = isinstance(self.allocation, GradientAllocation)
        alphas = self.level if learned else self.thresholds()
        for layer, alpha in zip(self.layers, alphas.tolist(), strict=True):
            value = 0.0 if self.frozen else min(alpha, torch.finfo(layer.weight.dtype).max)
            layer.threshold.set_threshold(value)

    def refresh(self) -> None:
        """Derive from the state what is not in it, after a state was loaded."""
        if not self.frozen:  # masks of a model that was sparse before count in the bounds
            self._bound([layer.masked for layer in self.layers], self.target)
        self._hand_out()

    def _bound(self, masked: list[int], target: float) -> None:
        self._density = DensityBounds(self.layers, masked, target, *self._densities)

    def _bounds(self, zeros: float) -> Bounds:
        """The bounds while `zeros` weights are to be zero."""
        density = self._density
        if zeros > density.zeros:  # on the way down to the target, whose floors come with it
            share = zeros / sum(self._sizes)
            density = DensityBounds(self.layers, density.masked, share, *self._densities)
        return density.at(zeros, self.level.device)

    def retarget(self, target: float, total_steps: int, zeros: int) -> None:
        """Start anew, from the present number of `zeros` to another target.

        Zeros that masks hold stay if the target is higher. If it is lower, those may return that
        were not there when the thresholds were put on.

        Raises:
            ValueError: If the bounds leave no room for the target; nothing is changed then.
        """
        rising = round(target * sum(self._sizes)) >= zeros
        alive = [layer.threshold.mask if rising else layer.given_mask for layer in self.layers]
        self._bound([count_gone(mask) for mask in alive], target)
        if self.frozen:
            self.write()  # momentum has moved what the masks hide
        for layer, mask in zip(self.layers, alive, strict=True):
            layer.threshold.mask = None if mask is None else mask.to(layer.weight.device)
        self._aim(target, total_steps)
        self.initial, self.frozen = zeros / sum(self._sizes), False
        self.update(0)
        self.wake(0)

    def _scores(self, sample: Sample) -> Scores:
        scores = sample.values * self.offsets().neg().exp()[sample.layer]
        return Scores(scores, sample.lengths, self._sizes)

    def _solve(self, scores: Scores, zeros: float) -> Tensor:
        budget = torch.tensor(zeros, dtype=torch.float64, device=self.level.device)
        return solve(scores, self._bounds(zeros), budget)

    # --- the end --------------------------------------------------------------------------------

    @torch.inference_mode(False)  # the masks stay for training, where this may be called from
    @torch.no_grad()
    def freeze(self) -> None:
        """Write the sparse weights into the parameters, with the exact number of zeros, masked.

        The thresholds stay as they are, and only the choice of zeros becomes exact: nothing is
        trained afterwards that could make up for a moved threshold.
        """
        self._set_offsets(self.offsets())
        chosen = zip(*self._select(), strict=True)
        self.hold([~pruned(self._score(i), *at) for i, at in enumerate(chosen)])
        if self.allocator is not None:
            self.allocator.stop()
        self._hand_out()

    def _select(self) -> tuple[list[int], list[int]]:
        """Decide on the weights to prune: read the scores near the level only, if that will do."""
        zeros = self.zeros
        bounds = self._bounds(zeros)
        scores = self._scores(Sample.draw(self.layers, self.level.device))
        window = scores.window(self._solve(scores, zeros))
        level, numbers = select(self._near(window), bounds, zeros)
        if all(
            low <= bits <= high for low, bits, high in zip(window[0], level, window[1], strict=True)
        ):
            return level, numbers
        everything = [-1] * len(level), [2**31] * len(level)
        return select(self._near(everything), bounds, zeros)

    def _score(self, index: int) -> Tensor:
        return magnitude(self.layers[index]) * self.offsets()[index].neg().exp()

    def _near(self, window: tuple[list[int], list[int]]) -> Scores:
        """The scores within a window of levels, one window a layer, and how many lie below it."""
        parts, below = [], []
        for i, (low, high) in enumerate(zip(*window, strict=True)):
            scores = self._score(i)
            bits = to_bits(scores)
            parts.append(scores[(bits >= low) & (bits <= high)])
            below.append((bits < low).sum())
        device = self.level.device
        return Scores(
            torch.cat([part.to(device) for part in parts]),
            [len(part) for part in parts],
            self._sizes,
            torch.stack([number.to(device) for number in below]),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has not asked for gradients yet.
        return {**self.__dict__, "asleep": True}
