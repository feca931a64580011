"""Bounds on the zeros of each layer and component, from `min_density` and `max_density`."""

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
    """Bounds on the zeros, which follow from densities and fixed zeros.

    The density of a component is the share of its weights that are not zero, or the share of its
    multiply-adds that are left, as `layers.counts` says.

    Args:
        layers: The layers.
        masked: The number of fixed zeros of each layer.
        target_sparsity: What is to be pruned at the end, as a fraction.
        min_density: Smallest density of a component, as a fraction; one number for all components,
            or a mapping by component.
        max_density: Largest density of a component, in the same form.

    Attributes:
        budget: What is to be pruned at the end: `layers.budget(target_sparsity)`, or what the fixed
            zeros count if they meet this already.
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
        self.budget, self.masked = layers.budget(target_sparsity), masked
        if layers.meets(masked, self.budget):  # from above, by a part of a weight
            self.budget = max(self.budget, layers.cost(masked))
        self._layers = layers
        kept = [
            _floor(layer, min(1.0 - target_sparsity, most[component]))
            for layer, component in zip(layers, layers.component, strict=True)
        ]
        at_least_one = [max(1, k) for k in kept]
        if layers.cost(at_least_one) <= layers.total_cost - self.budget:
            kept = at_least_one
        self._layer_max = [
            max(size - k, m) for size, k, m in zip(layers.sizes, kept, masked, strict=True)
        ]
        weights, pruned = layers.units
        sizes = layers.sum_components(layers.sizes)
        room, fixed = layers.sum_components(self._layer_max), layers.sum_components(masked)
        self._least: list[float] = []
        self._most: list[float] = []
        rows = []
        slack = 1e-12 * layers.total_cost  # for rounding errors; much less than a weight counts
        for c, name in enumerate(layers.components):
            highest = min(self._part(1.0 - least[c], sizes[c]), room[c])
            lowest = max(sizes[c] - self._part(most[c], sizes[c]), fixed[c])
            if lowest > highest + slack:
                raise ValueError(
                    f"min_density={least[c]} and max_density={most[c]} leave component "
                    f"{name!r} no room: of its {sizes[c]:.12g} {weights} at least {lowest:.12g} "
                    f"and at most {highest:.12g} would have to be zero. Lower the one or raise the "
                    f"other."
                )
            self._least.append(lowest)
            self._most.append(highest)
            rows.append(
                f"  {name}: {lowest:.12g} to {highest:.12g} of {sizes[c]:.12g} {weights} zero"
            )
        if not sum(self._least) - slack <= self.budget <= sum(self._most) + slack:
            raise ValueError(
                f"target_sparsity={target_sparsity} asks for {self.budget:.12g} {pruned}, but the "
                f"bounds (min_density, max_density, and the {sum(masked)} weights that are zero "
                f"already and stay so) allow {sum(self._least):.12g} to {sum(self._most):.12g}:\n"
                + "\n".join(rows)
                + "\nChange the target or the bounds, or pass keep_zeros=False."
            )

    def at(self, budget: float, device: torch.device) -> Bounds:
        """Return the bounds for an update that is to prune `budget`."""
        # What the components prune at least rises in proportion to all that is pruned.
        share = min(1.0, budget / self.budget) if self.budget else 1.0
        layers, whole = self._layers, self._layers.counts == "weights"
        least = [math.floor(k * share) if whole else k * share for k in self._least]

        def tensor(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return Bounds(
            torch.tensor(layers.component, device=device),
            tensor(self._layer_max),
            tensor(least),
            tensor(self._most),
            None if whole else tensor(layers.costs),
        )

    def _part(self, fraction: float, cost: float) -> float:
        """`fraction * cost`, which is an integer if weights are counted."""
        return _share(fraction, cost) if self._layers.counts == "weights" else fraction * cost


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


def _share(fraction: float, size: float) -> int:
    """`fraction * size`, rounded down but for rounding errors: `(1 - 0.9) * 10` gives 1."""
    return math.floor(fraction * size + 1e-6)
