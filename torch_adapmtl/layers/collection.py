"""The collection of the layers of a run, with their sizes and components."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer, count_zeros

__all__ = ["Layers"]


class Layers(Sequence[Layer]):
    """The prunable tensors of a run, in the order of `model.parameters()`.

    Args:
        layers: The layers, at least one.
        count: What the budget counts: `"weights"`, or `"macs"` for the multiply-adds that the
            weights take part in.

    Raises:
        ValueError: If multiply-adds are counted, and those of a layer are not known.

    Attributes:
        counts: What the budget counts.
        costs: What a weight of each layer counts in the budget: 1, or `layer.positions`.
        total_cost: What all weights count: their number, or that of their multiply-adds.
        sizes: Number of weights of each layer.
        total: Number of weights of all layers, N.
        components: Names of the components, in the order of their first layer.
        component: The index of each layer's component in `components`.

    Example:
        >>> import torch
        >>> from torch_adapmtl import Layer, Layers
        >>> a, b = torch.nn.Linear(4, 2), torch.nn.Linear(2, 3)
        >>> layers = Layers(
        ...     [
        ...         Layer("a.weight", "shared", ((a, "weight"),)),
        ...         Layer("b.weight", "b", ((b, "weight"),)),
        ...     ]
        ... )
        >>> layers.sizes, layers.total, layers.components, layers.budget(0.9)
        ([8, 6], 14, ('shared', 'b'), 13)
    """

    def __init__(
        self, layers: Iterable[Layer], count: Literal["weights", "macs"] = "weights"
    ) -> None:
        self._layers, self.counts = tuple(layers), count
        self.costs: list[float] = [
            _positions(layer) if count == "macs" else 1 for layer in self._layers
        ]
        self.sizes = [layer.weight.numel() for layer in self._layers]
        self.total = sum(self.sizes)
        self.total_cost = self.cost(self.sizes)
        self.components = tuple(dict.fromkeys(layer.component for layer in self._layers))
        self.component = [self.components.index(layer.component) for layer in self._layers]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, index: int | slice) -> Layer | tuple[Layer, ...]:
        return self._layers[index]

    @property
    def device(self) -> torch.device:
        """The device of the first layer, where tensors with one entry for each layer are."""
        return self._layers[0].weight.device

    @property
    def units(self) -> tuple[str, str]:
        """What the budget counts, in words: of all weights, and of zeros."""
        weights = self.counts == "weights"
        return ("weights", "zeros") if weights else ("multiply-adds", "saved multiply-adds")

    @property
    def names(self) -> dict[str, str]:
        """The component of each layer, by the layer's name."""
        return {layer.name: layer.component for layer in self._layers}

    @property
    def initial_zeros(self) -> list[int]:
        """The number of fixed zeros of each layer when the run began."""
        return [count_zeros(layer.initial_mask) for layer in self._layers]

    def budget(self, sparsity: float) -> float:
        """Return what is to be pruned at a sparsity, a fraction.

        It is a number of zeros, `round(sparsity * N)`, or the multiply-adds that zeros save,
        `sparsity * total_cost`, which need not be an integer.
        """
        budget = sparsity * self.total_cost
        return budget if self.counts == "macs" else round(budget)

    def cost(self, zeros: Sequence[float]) -> float:
        """Return what so many zeros of each layer count in the budget."""
        return sum(cost * number for cost, number in zip(self.costs, zeros, strict=True))

    def meets(self, zeros: Sequence[int], budget: float) -> bool:
        """Whether so many zeros of each layer meet a budget.

        With `count="weights"` they have to be exactly as many. With `count="macs"` they have to
        meet it to within less than what one weight counts.
        """
        return abs(self.cost(zeros) - budget) < max(self.costs)

    def sum_components(self, zeros: Sequence[float]) -> list[float]:
        """Return what so many zeros of each layer count in the budget, by component."""
        sums: list[float] = [0] * len(self.components)
        for component, cost, number in zip(self.component, self.costs, zeros, strict=True):
            sums[component] += cost * number
        return sums

    def count_zeros(self) -> list[int]:
        """Count the zeros that the model computes with, for each layer; reads every weight."""
        return self.zeros().tolist()

    def zeros(self) -> Tensor:
        """Return the result of `count_zeros`, int64 of shape (L,), without waiting for it."""
        # On a CPU this allocates no memory, unlike a comparison.
        nonzero = [torch.count_nonzero(layer.sparse()) for layer in self._layers]
        zeros = [size - count for size, count in zip(self.sizes, nonzero, strict=True)]
        return torch.stack([number.to(self.device) for number in zeros])

    def attach(self) -> None:
        """Attach the thresholds to all layers; after an error, to none."""
        started = []
        try:
            for layer in self._layers:
                started.append(layer)
                layer.attach()
        except Exception:
            for layer in started:
                layer.remove(bake=False)
            raise

    def check_ties(self) -> None:
        """Raise a `ValueError` if `torch.nn.utils.prune` masks a tied weight in different ways."""
        for layer in self._layers:
            masks = [module._buffers.get(name + "_mask") for module, name in layer.owners]
            if not all(_same(masks[0], mask) for mask in masks[1:]):
                raise ValueError(
                    f"{layer.name!r} is tied, and torch.nn.utils.prune masks it differently in the "
                    f"{len(masks)} modules that hold it: give all of them the same mask "
                    f"(prune.custom_from_mask), or remove it"
                )


def _positions(layer: Layer) -> float:
    if layer.positions is None:
        raise ValueError(
            f"count='macs': no multiply-adds are known that the weights of {layer.name!r} take "
            f"part in. No example inputs have run through the model, or an operation that is not "
            f"known uses the weights, or none multiplies by them (as with an embedding). Pass "
            f"example_inputs=; or pass the number for one weight and one example, as in "
            f"count={{{layer.name!r}: 64}}; or leave the tensor out with exclude="
        )
    return layer.positions


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
