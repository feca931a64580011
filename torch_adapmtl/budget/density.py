"""How few and how many zeros each layer and component may have, from the user's densities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer, members
from torch_adapmtl.budget.solver import Bounds

__all__ = ["DensityBounds"]

# A layer keeps at least this share of the average density.
_LAYER_FLOOR = 0.1


class DensityBounds:
    """The bounds on the numbers of zeros that densities and masks set.

    Args:
        layers: The layers, in the model's order.
        masked: For each of them how many weights are zero for good.
        target: Zeros among all weights at the end, as a fraction.
        min_density: Least density of a component, as a fraction; one for all, or by name.
        max_density: The same for the largest.

    Attributes:
        zeros: The number of zeros at the end, `round(target * N)`.
        masked: As given.

    Raises:
        ValueError: If the bounds leave no room for the target; with the arithmetic.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        masked: Sequence[int],
        target: float,
        min_density: float | Mapping[str, float] | None,
        max_density: float | Mapping[str, float] | None,
    ) -> None:
        by_name = members(layers)
        least = _by_component("min_density", min_density, 0.0, by_name)
        most = _by_component("max_density", max_density, 1.0, by_name)
        sizes = [layer.weight.numel() for layer in layers]
        self.zeros, self.masked = round(target * sum(sizes)), masked
        self._index = {name: c for c, name in enumerate(by_name)}
        self._component = [self._index[layer.component] for layer in layers]
        density = [min(1.0 - target, most[layer.component]) for layer in layers]
        kept = [_floor(layer, d) for layer, d in zip(layers, density, strict=True)]
        alive = [max(1, k) for k in kept]
        if sum(alive) <= sum(sizes) - self.zeros:  # one weight each, where there are enough
            kept = alive
        self._layer_max = [max(n - k, m) for n, k, m in zip(sizes, kept, masked, strict=True)]
        self._min_zeros, self._max_zeros = [], []
        rows = []
        for name, indices in by_name.items():
            size = sum(sizes[i] for i in indices)
            highest = min(_share(1.0 - least[name], size), sum(self._layer_max[i] for i in indices))
            lowest = max(size - _share(most[name], size), sum(masked[i] for i in indices))
            if lowest > highest:
                raise ValueError(
                    f"min_density={least[name]} and max_density={most[name]} leave component "
                    f"{name!r} no room: of its {size} weights at least {lowest} and at most "
                    f"{highest} would have to be zero. Lower the one or raise the other."
                )
            self._min_zeros.append(lowest)
            self._max_zeros.append(highest)
            rows.append(f"  {name}: {lowest} to {highest} of {size} weights zero")
        if not sum(self._min_zeros) <= self.zeros <= sum(self._max_zeros):
            raise ValueError(
                f"target_sparsity={target} asks for {self.zeros} zeros, but the bounds "
                f"(min_density, max_density, and the {sum(masked)} weights that are zero already "
                f"and stay so) allow {sum(self._min_zeros)} to {sum(self._max_zeros)}:\n"
                + "\n".join(rows)
                + "\nChange the target or the bounds, or pass keep_zeros=False."
            )

    def at(self, zeros: float, device: torch.device) -> Bounds:
        """The bounds while `zeros` weights are to be zero."""
        # What a component must lose, it loses in step with the schedule.
        share = min(1.0, zeros / self.zeros) if self.zeros else 1.0

        def counts(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return Bounds(
            torch.tensor(self._component, device=device),
            counts(self._layer_max),
            counts([math.floor(k * share) for k in self._min_zeros]),
            counts(self._max_zeros),
        )


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
                f"{argument} names the component {name!r}; name one of the components "
                f"{list(components)}"
            )
        if density is None:
            continue
        if isinstance(density, bool) or not isinstance(density, Real):
            raise TypeError(f"{argument} of {name!r} must be a fraction, got {density!r}")
        if not 0.0 <= float(density) <= 1.0:
            raise ValueError(f"{argument} of {name!r} must lie in [0, 1], got {density}")
    return {
        name: default if given.get(name) is None else float(given[name])  # type: ignore[arg-type]
        for name in components
    }


def _floor(layer: Layer, density: float) -> int:
    """How many weights a layer keeps in any case, so that it does not die.

    A tenth of the average density, or more in a layer with few weights to an input and an output:
    the average density of (fan in + fan out) weights, as in the Erdős-Rényi allocation (Mocanu et
    al., arXiv 1707.04780). Never more than the average density of the layer.
    """
    size = layer.weight.numel()
    outputs = layer.weight.shape[0] if layer.weight.ndim else 1
    needed = (outputs + size / outputs) / size if size else 0.0
    return _share(density * min(1.0, max(_LAYER_FLOOR, needed)), size)


def _share(fraction: float, size: int) -> int:
    """The whole part of `fraction * size`, where 0.07 of 100 is 7 and 1 - 0.9 of 10 is 1."""
    return math.floor(fraction * size + 1e-6)
