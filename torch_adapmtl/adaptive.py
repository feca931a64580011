"""The adaptive controller: one level for the budget, a learned offset for every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._layers import Layer, PerComponent, members
from ._masks import shaped_like
from ._precision import KeepsPrecision
from .budget import Bounds, Scores, SparsitySchedule, from_bits, pruned, select, solve, to_bits
from .thresholds import SoftThreshold

__all__ = ["AdaptiveBudget", "GradientAllocation", "SensitivityAllocation"]

# Scores looked at in one update. All of them up to here; an even sample of larger models, with an
# error of the overall sparsity (one standard deviation at 90 %) below 0.1 % of the weights.
_SAMPLE = 2**18
# Fewest scores sampled in a layer.
_LAYER_SAMPLE = 1024
# A layer keeps at least this share of the average density, so that none dies.
_LAYER_FLOOR = 0.1


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

    Example:
        >>> from torch_adapmtl import SensitivityAllocation
        >>> SensitivityAllocation(bound=2.3)
        SensitivityAllocation(rate=0.1, bound=2.3, decay=0.9, prior=20.0)
    """

    rate: float = 0.1
    bound: float = 1.1
    decay: float = 0.9
    prior: float = 20.0

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and 0 < self.bound < math.inf):
            raise ValueError(
                f"allocation: rate and bound must be > 0, got rate={self.rate}, bound={self.bound}"
            )
        if not (0 <= self.decay < 1 and 0 <= self.prior < math.inf):
            raise ValueError(
                f"allocation: decay must lie in [0, 1) and prior be >= 0, got "
                f"decay={self.decay}, prior={self.prior}"
            )


@dataclass(frozen=True)
class GradientAllocation:
    """Offsets trained by the task gradient, through the thresholds: the paper's way.

    The budget still holds the overall sparsity; the gradient decides who bears it.

    Args:
        bound: Largest offset, in units of log alpha; > 0.

    Raises:
        ValueError: If `bound` is not positive.

    Example:
        >>> from torch_adapmtl import GradientAllocation
        >>> GradientAllocation()
        GradientAllocation(bound=2.3)
    """

    bound: float = 2.3

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise ValueError(f"allocation: bound must be > 0, got {self.bound}")


Allocation = SensitivityAllocation | GradientAllocation | None


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


class AdaptiveBudget(KeepsPrecision):
    """Keeps the overall sparsity on its schedule and shares it out between the layers.

    Args:
        layers: The layers, in the model's order; their thresholds are made here.
        target: Zeros among all weights of the layers at the end, as a fraction.
        total_steps: Number of steps.
        schedule: How the sparsity gets there.
        granularity: One offset per `"layer"` or per `"component"`.
        allocation: How the offsets are learned; None for one common threshold.
        straight_through: Whether pruned weights keep learning.
        min_density: Least density of a component, as a fraction; one for all, or by name.
        max_density: The same for the largest.

    Raises:
        ValueError: If the bounds leave no room for the target; with the arithmetic.
    """

    level: Tensor
    saliency: Tensor

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        schedule: SparsitySchedule,
        granularity: Literal["layer", "component"],
        allocation: Allocation,
        straight_through: bool,
        min_density: float | Mapping[str, float] | None = None,
        max_density: float | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.target, self.total_steps, self.schedule = target, total_steps, schedule
        self.allocation = allocation
        self.interval = max(1, min(10, total_steps // 50))
        self.frozen = False
        self._sizes = [layer.weight.numel() for layer in layers]
        self.zeros = round(target * sum(self._sizes))
        self._members = members(layers)
        self._set_bounds(min_density, max_density)

        device = layers[0].weight.device
        learned = isinstance(allocation, GradientAllocation)
        offsets = {}
        for name, indices in self._members.items():
            shape = (len(indices),) if granularity == "layer" else ()
            offset = torch.zeros(shape, device=device)
            offsets[name] = nn.Parameter(offset) if learned else offset
        self.offset = PerComponent(offsets)
        self.register_buffer("level", torch.zeros(len(layers), device=device))
        # Decayed sum of the saliency in the band above the threshold, and number of weights in it.
        self.register_buffer("saliency", torch.zeros(2, len(layers), device=device))
        for indices in self._members.values():
            for position, i in enumerate(indices):
                layer = layers[i]
                options: dict[str, Any] = {
                    "straight_through": straight_through,
                    "persistent": False,
                }
                threshold = (
                    _OffsetThreshold(self.offset, layer.component, position, **options)
                    if learned
                    else SoftThreshold(0.0, **options)
                )
                layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)
        self.asleep = False
        self._gradients: dict[int, Tensor] = {}
        self._listening = False
        self._hooked: list[tuple[nn.Parameter, Any]] = []

    # --- bounds ---------------------------------------------------------------------------------

    def _set_bounds(
        self,
        min_density: float | Mapping[str, float] | None,
        max_density: float | Mapping[str, float] | None,
    ) -> None:
        least = _by_component("min_density", min_density, 0.0, self._members)
        most = _by_component("max_density", max_density, 1.0, self._members)
        masked = [_masked(layer) for layer in self.layers]
        average = 1.0 - self.target
        self._layer_max = [
            max(n - _share(_LAYER_FLOOR * min(average, most[layer.component]), n), m)
            for layer, n, m in zip(self.layers, self._sizes, masked, strict=True)
        ]
        self._min_zeros, self._max_zeros = [], []
        rows = []
        for name, indices in self._members.items():
            size = sum(self._sizes[i] for i in indices)
            kept = size - _share(1.0 - least[name], size)
            highest = min(size - kept, sum(self._layer_max[i] for i in indices))
            lowest = max(size - _share(most[name], size), sum(masked[i] for i in indices))
            if lowest > highest:
                raise ValueError(
                    f"min_density and max_density leave component {name!r} no room: of its {size} "
                    f"weights at least {lowest} and at most {highest} would have to be zero"
                )
            self._min_zeros.append(lowest)
            self._max_zeros.append(highest)
            rows.append(f"  {name}: {lowest} to {highest} of {size} weights zero")
        if not sum(self._min_zeros) <= self.zeros <= sum(self._max_zeros):
            raise ValueError(
                f"target_sparsity={self.target} asks for {self.zeros} zeros, but the bounds "
                f"(min_density, max_density, masks already there) allow "
                f"{sum(self._min_zeros)} to {sum(self._max_zeros)}:\n"
                + "\n".join(rows)
                + "\nChange the target or the bounds."
            )

    def _bounds(self, zeros: float, device: torch.device) -> Bounds:
        # What a component must lose, it loses in step with the schedule.
        share = min(1.0, zeros / self.zeros) if self.zeros else 1.0
        lowest = [math.floor(k * share) for k in self._min_zeros]
        of = {name: c for c, name in enumerate(self._members)}

        def counts(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return Bounds(
            torch.tensor([of[layer.component] for layer in self.layers], device=device),
            counts(self._layer_max),
            counts(lowest),
            counts(self._max_zeros),
        )

    # --- offsets --------------------------------------------------------------------------------

    def offsets(self) -> Tensor:
        """The offset of each layer, in units of log alpha, float32 of shape (L,); detached."""
        offset = torch.zeros_like(self.level)
        for name, indices in self._members.items():
            offset[indices] = self.offset[name].detach().to(offset.dtype)
        return offset

    def _set_offsets(self, offset: Tensor) -> None:
        for name, indices in self._members.items():
            own = self.offset[name]
            own.copy_(offset[indices] if own.ndim else offset[indices[0]])

    def _bound_offsets(self) -> None:
        if self.allocation is not None:
            bound = self.allocation.bound
            # An offset that the gradient has thrown out of all numbers starts anew.
            self._set_offsets(self.offsets().nan_to_num(0.0).clamp(-bound, bound))

    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""
        return self.level * self.offsets().exp()

    # --- the rare update ------------------------------------------------------------------------

    def step(self, step: int) -> bool:
        """Do what is due after `step` steps; tell whether it was an update (it synchronises)."""
        due = step % self.interval == 0 or step == self.total_steps
        if due and not self.frozen:
            self.freeze() if step == self.total_steps else self.update(step)
        self.wake(step)
        return due

    def wake(self, step: int) -> None:
        """Be ready for the gradients of the step after `step`."""
        self.asleep = False
        self._listen((step + 1) % self.interval == 0)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Balance the offsets, then solve for the level that meets the schedule."""
        magnitude, lengths = self._sampled()
        if isinstance(self.allocation, SensitivityAllocation):
            self._balance(self.allocation, magnitude, lengths)
        self._bound_offsets()
        zeros = self.schedule(step, self.total_steps, self.target) * sum(self._sizes)
        scores = Scores(self._scored(magnitude, lengths), lengths, self._sizes)
        budget = torch.tensor(zeros, dtype=torch.float64, device=magnitude.device)
        level = solve(scores, self._bounds(zeros, magnitude.device), budget)
        self.level.copy_(from_bits(level))
        self.refresh()

    def refresh(self) -> None:
        """Hand every layer its threshold, after an update or a loaded state."""
        learned = isinstance(self.allocation, GradientAllocation)
        alphas = self.level if learned else self.thresholds()
        for layer, alpha in zip(self.layers, alphas.tolist(), strict=True):
            value = 0.0 if self.frozen else min(alpha, _largest(layer.weight))
            layer.threshold.set_threshold(value)

    def _scored(self, magnitude: Tensor, lengths: list[int]) -> Tensor:
        length = torch.tensor(lengths, device=magnitude.device)
        divisor = torch.repeat_interleave(
            self.offsets().neg().exp(), length, output_size=len(magnitude)
        )
        return magnitude * divisor

    def _sampled(self) -> tuple[Tensor, list[int]]:
        parts = [
            _masked_magnitude(layer, _positions(size, sum(self._sizes), layer.weight.device))
            for layer, size in zip(self.layers, self._sizes, strict=True)
        ]
        device = self.level.device
        return torch.cat([part.to(device) for part in parts]), [len(part) for part in parts]

    # --- sensitivity ----------------------------------------------------------------------------

    def _listen(self, listening: bool) -> None:
        wanted = isinstance(self.allocation, SensitivityAllocation) and not self.frozen
        self._listening = listening and wanted
        if not wanted:
            self._unhook()
        elif listening:
            weights = [layer.weight for layer in self.layers]
            if [id(w) for w in weights] != [id(w) for w, _ in self._hooked]:
                self._unhook()
                self._hooked = [(w, self._hook(i, w)) for i, w in enumerate(weights)]

    def _hook(self, index: int, weight: nn.Parameter) -> Any:
        if not weight.requires_grad:
            return None
        positions = _positions(weight.numel(), sum(self._sizes), weight.device)

        def remember(parameter: Tensor) -> None:
            # Once in an interval, and a sample only: the gradient is gone when step() is called.
            if self._listening and parameter.grad is not None:
                taken = _take(parameter.grad, positions)
                # Not a view: what follows may write to the gradient (zeroing, unscaling, clipping).
                self._gradients[index] = taken.clone() if positions is None else taken

        return weight.register_post_accumulate_grad_hook(remember)

    def _unhook(self) -> None:
        for _, handle in self._hooked:
            if handle is not None:
                handle.remove()
        self._hooked = []
        self._gradients = {}

    def _balance(
        self, options: SensitivityAllocation, magnitude: Tensor, lengths: list[int]
    ) -> None:
        device = magnitude.device
        gradient = torch.zeros_like(magnitude)
        seen = torch.zeros(len(lengths), dtype=torch.bool)
        for index, part in zip(range(len(lengths)), gradient.split(lengths), strict=True):
            if index in self._gradients:
                part.copy_(self._gradients[index])
                seen[index] = True
        self._gradients = {}
        length = torch.tensor(lengths, device=device)
        layer = torch.repeat_interleave(
            torch.arange(len(lengths), device=device), length, output_size=len(magnitude)
        )
        alpha = self.thresholds()[layer]
        band = (magnitude > alpha) & (magnitude <= 2 * alpha) & seen.to(device)[layer]
        saliency = ((magnitude * gradient) ** 2).masked_fill(~band, 0.0)
        new = torch.zeros_like(self.saliency)
        new[0].index_add_(0, layer, saliency)
        new[1].index_add_(0, layer, band.to(new.dtype))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)
        new = torch.where(new.isfinite().all(), new, 0.0)  # a step that a gradient scaler skips
        self.saliency.mul_(options.decay).add_(new)

        total, count = self.saliency
        weight = torch.tensor(self._sizes, device=device) / length  # how many one stands for
        overall = (total * weight).sum() / (count * weight).sum()
        if self.offset[next(iter(self._members))].ndim == 0:
            total, weighted, count = (
                self._pooled(v) for v in (total * weight, count * weight, count)
            )
        else:
            weighted = count
        ratio = (total / weighted / overall).log()
        trust = count / (count + options.prior)
        move = -options.rate / 2 * ratio.clamp(-4.0, 4.0) * trust
        move = torch.where(move.isfinite(), move, 0.0)
        self._set_offsets(self.offsets() + move)

    def _pooled(self, values: Tensor) -> Tensor:
        """Replace each layer's value by the sum over its component."""
        pooled = torch.empty_like(values)
        for indices in self._members.values():
            pooled[indices] = values[indices].sum()
        return pooled

    # --- the end --------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self) -> None:
        """Write the sparse weights into the parameters, exactly `zeros` of them 0, under masks."""
        self._bound_offsets()
        magnitude, lengths = self._sampled()
        device = magnitude.device
        bounds = self._bounds(self.zeros, device)
        sample = Scores(self._scored(magnitude, lengths), lengths, self._sizes)
        budget = torch.tensor(self.zeros, dtype=torch.float64, device=device)
        window = sample.window(solve(sample, bounds, budget))
        level, numbers = select(self._near(window), bounds, self.zeros)
        if any(not a <= bits <= b for a, bits, b in zip(window[0], level, window[1], strict=True)):
            everything = [-1] * len(level), [2**31] * len(level)
            level, numbers = select(self._near(everything), bounds, self.zeros)
        alpha = (from_bits(torch.tensor(level, device=device)) * self.offsets().exp()).tolist()
        for i, layer in enumerate(self.layers):
            keep = shaped_like(layer.weight, ~pruned(self._score(i), level[i], numbers[i]))
            layer.threshold.mask = None
            shrunk = SoftThreshold(min(alpha[i], _largest(layer.weight)))(layer.weight)
            # A survivor that ties with the threshold, or was zero all along, must not count as a
            # zero: it becomes the smallest normal number of its type.
            tiny = torch.finfo(shrunk.dtype).tiny
            shrunk = torch.where(shrunk == 0, tiny, shrunk)
            layer.weight.copy_(shrunk.masked_fill_(~keep, 0.0))
            layer.threshold.mask = keep
        self.level.zero_()
        self.frozen = True
        self._unhook()
        self.refresh()

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the weights that remain from being zero, which training may have made them since."""
        for layer in self.layers:
            if layer.threshold.mask is not None:
                weight = layer.weight
                lost = (weight == 0) & layer.threshold.mask
                weight.masked_fill_(lost, torch.finfo(weight.dtype).tiny)

    def _score(self, index: int) -> Tensor:
        return _masked_magnitude(self.layers[index], None) * self.offsets()[index].neg().exp()

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

    # --- copies ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the parameters of this very model; a copy makes its own when it listens.
        silent = {"asleep": True, "_listening": False, "_hooked": [], "_gradients": {}}
        return {**self.__dict__, **silent}


def _by_component(
    argument: str,
    value: float | Mapping[str, float] | None,
    default: float,
    components: Mapping[str, Any],
) -> dict[str, float]:
    given = value if isinstance(value, Mapping) else dict.fromkeys(components, value)
    for name, density in given.items():
        if name not in components:
            raise ValueError(
                f"{argument} names the component {name!r}; the components are {list(components)}"
            )
        if density is not None and not 0.0 <= density <= 1.0:
            raise ValueError(f"{argument} of {name!r} must lie in [0, 1], got {density}")
    return {
        name: default if given.get(name) is None else float(given[name])  # type: ignore[arg-type]
        for name in components
    }


def _share(fraction: float, size: int) -> int:
    """The whole part of `fraction * size`, where 0.07 of 100 is 7 and 1 - 0.9 of 10 is 1."""
    return math.floor(fraction * size + 1e-6)


def _positions(size: int, total: int, device: torch.device) -> Tensor | None:
    """Where to sample a layer: evenly spread and always the same; None for all of it."""
    wanted = size if total <= _SAMPLE else max(_LAYER_SAMPLE, round(size / total * _SAMPLE))
    if wanted >= size:
        return None
    # Steps of the golden section of the size leave no gaps and follow no row or channel.
    stride = int(size * 0.6180339887498949)
    while math.gcd(stride, size) != 1:
        stride += 1
    return torch.arange(wanted, device=device).mul_(stride).remainder_(size)


def _take(tensor: Tensor, positions: Tensor | None) -> Tensor:
    flat = tensor.detach().flatten() if positions is None else tensor.detach().take(positions)
    return flat.float()


def _masked_magnitude(layer: Layer, positions: Tensor | None) -> Tensor:
    magnitude = _take(layer.weight, positions).abs()
    mask = layer.threshold.mask
    if mask is not None:  # what is masked is gone already
        kept = mask.flatten() if positions is None else mask.take(positions)
        magnitude = magnitude.masked_fill(~kept, -1.0)
    return magnitude


def _masked(layer: Layer) -> int:
    module, name = layer.owners[0]
    mask = module._buffers.get(name + "_mask")
    return 0 if mask is None else int((mask == 0).sum())


def _largest(weight: Tensor) -> float:
    return torch.finfo(weight.dtype).max
