"""Bounds on the number of zeros of each layer and component, from `min_density`, `max_density`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from torch_adapmtl.budget.solver import Bounds
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer

__all__ = ["DensityBounds", "check_density"]

Density = float | Mapping[str, float] | None
"""A fraction for all components, or a mapping by component; None for no bound."""

# A layer keeps at least this share of the average density.
_LAYER_FLOOR = 0.1


class DensityBounds:
    """Bounds on the numbers of zeros, which follow from densities and fixed zeros.

    Args:
        layers: The layers.
        masked: The number of fixed zeros of each layer.
        target_sparsity: Zeros among all weights at the end, as a fraction.
        min_density: Smallest density of a component, as a fraction; one number for all components,
            or a mapping by component.
        max_density: Largest density of a component, in the same form.

    Attributes:
        zeros: The number of zeros at the end, `round(target_sparsity * N)`.
        masked: The number of fixed zeros of each layer.

    Raises:
        ValueError: If the bounds make the target impossible; the error shows the numbers.
    """

    def __init__(
        self,
        layers: Layers,
        masked: Sequence[int],
        target_sparsity: float,
        min_density: Density,
        max_density: Density,
    ) -> None:
        least = _by_component("min_density", min_density, 0.0, layers.components)
        most = _by_component("max_density", max_density, 1.0, layers.components)
        self.zeros, self.masked = layers.zeros_at(target_sparsity), masked
        self._component = layers.component
        kept = [
            _floor(layer, min(1.0 - target_sparsity, most[component]))
            for layer, component in zip(layers, layers.component, strict=True)
        ]
        at_least_one = [max(1, k) for k in kept]
        if sum(at_least_one) <= layers.total - self.zeros:
            kept = at_least_one
        self._layer_max = [
            max(size - k, m) for size, k, m in zip(layers.sizes, kept, masked, strict=True)
        ]
        sizes = layers.sum_components(layers.sizes)
        room, fixed = layers.sum_components(self._layer_max), layers.sum_components(masked)
        self._min_zeros, self._max_zeros = [], []
        rows = []
        for c, name in enumerate(layers.components):
            highest = min(_share(1.0 - least[c], sizes[c]), room[c])
            lowest = max(sizes[c] - _share(most[c], sizes[c]), fixed[c])
            if lowest > highest:
                raise ValueError(
                    f"min_density={least[c]} and max_density={most[c]} leave component "
                    f"{name!r} no room: of its {sizes[c]} weights at least {lowest} and at most "
                    f"{highest} would have to be zero. Lower the one or raise the other."
                )
            self._min_zeros.append(lowest)
            self._max_zeros.append(highest)
            rows.append(f"  {name}: {lowest} to {highest} of {sizes[c]} weights zero")
        if not sum(self._min_zeros) <= self.zeros <= sum(self._max_zeros):
            raise ValueError(
                f"target_sparsity={target_sparsity} asks for {self.zeros} zeros, but the bounds "
                f"(min_density, max_density, and the {sum(masked)} weights that are zero already "
                f"and stay so) allow {sum(self._min_zeros)} to {sum(self._max_zeros)}:\n"
                + "\n".join(rows)
                + "\nChange the target or the bounds, or pass keep_zeros=False."
            )

    def at(self, zeros: float, device: torch.device) -> Bounds:
        """Return the bounds for an update at which `zeros` weights should be zero."""
        # The smallest numbers of zeros of the components rise in proportion to all zeros.
        share = min(1.0, zeros / self.zeros) if self.zeros else 1.0

        def counts(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return Bounds(
            torch.tensor(self._component, device=device),
            counts(self._layer_max),
            counts([math.floor(k * share) for k in self._min_zeros]),
            counts(self._max_zeros),
        )


def check_density(argument: str, density: object) -> None:
    """Raise an error unless `density` is None, a fraction in [0, 1], or a mapping of them."""
    by_name = density if isinstance(density, Mapping) else {None: density}
    for name, value in by_name.items():
        what = argument if name is None else f"{argument} of {name!r}"
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{what} must be a fraction, got {value!r}")
        if not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"{what} must lie in [0, 1], got {value}")


def _by_component(
    argument: str, density: Density, default: float, components: Sequence[str]
) -> list[float]:
    """The density of each component."""
    by_name = density if isinstance(density, Mapping) else dict.fromkeys(components, density)
    for name in by_name:
        if name not in components:
            raise ValueError(
                f"{argument} names the component {name!r}; name one of the components "
                f"{list(components)}"
            )
    values = [by_name.get(name) for name in components]
    return [default if value is None else float(value) for value in values]


def _floor(layer: Layer, density: float) -> int:
    """The smallest number of nonzero weights that a layer keeps.

    With d the overall density, it is the larger of two numbers: `0.1 * d` times the number of
    weights, and d times (fan in + fan out), as in the Erdős-Rényi allocation (Mocanu et al., arXiv
    1707.04780). It is at most d times the number of weights.
    """
    size = layer.weight.numel()
    outputs = layer.weight.shape[0] if layer.weight.ndim else 1
    needed = (outputs + size / outputs) / size if size else 0.0
    return _share(density * min(1.0, max(_LAYER_FLOOR, needed)), size)


def _share(fraction: float, size: int) -> int:
    """`fraction * size`, rounded down but for rounding errors: `(1 - 0.9) * 10` gives 1."""
    return math.floor(fraction * size + 1e-6)
