"""An even sample of a model's weights, so that an update need not read all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_adapmtl._distributed import whole
from torch_adapmtl.layers.layer import Layer

__all__ = ["Sample", "magnitude", "positions", "take"]

# Weights looked at in one update. All of them up to here; an even sample of larger models, with an
# error of the overall sparsity (one standard deviation at 90 %) below 0.1 % of the weights.
SAMPLE = 2**17
# Fewest weights sampled in a layer.
LAYER_SAMPLE = 1024


@dataclass(frozen=True)
class Sample:
    """Magnitudes of the layers' weights, or of a sample of them.

    Attributes:
        values: `|w|`, float32, flat, all layers one after the other; -1 where a mask holds a zero.
        lengths: How many belong to each layer.
        layer: The index of the layer that each belongs to.
    """

    values: Tensor
    lengths: list[int]
    layer: Tensor

    @staticmethod
    def draw(layers: Sequence[Layer], device: torch.device) -> Sample:
        """Read the sampled weights, or all weights of a small model."""
        total = sum(layer.weight.numel() for layer in layers)
        parts = [
            magnitude(layer, positions(layer.weight.numel(), total, layer.weight.device))
            for layer in layers
        ]
        values = torch.cat([part.to(device) for part in parts])
        lengths = [len(part) for part in parts]
        layer = torch.repeat_interleave(
            torch.arange(len(parts), device=device),
            torch.tensor(lengths, device=device),
            output_size=len(values),
        )
        return Sample(values, lengths, layer)


def positions(size: int, total: int, device: torch.device) -> Tensor | None:
    """Where to sample a layer: evenly spread and always the same; None for all of it."""
    wanted = size if total <= SAMPLE else max(LAYER_SAMPLE, round(size / total * SAMPLE))
    return None if wanted >= size else _spread(size, wanted, device)


@lru_cache(maxsize=4096)  # of layers; a megabyte for each model
def _spread(size: int, wanted: int, device: torch.device) -> Tensor:
    # One in each of as many equal stretches; where in it follows no row or channel.
    number = torch.arange(wanted + 1, device=device)
    start = (number * size).div_(wanted, rounding_mode="floor")
    inside = (number[:-1].double() * 0.6180339887498949).frac()
    return start[:-1] + (inside * start.diff()).long()


def take(tensor: Tensor, where: Tensor | None) -> Tensor:
    """The entries at these positions, or all, float32 and flat."""
    tensor = whole(tensor.detach())
    return (tensor.flatten() if where is None else tensor.take(where)).float()


def magnitude(layer: Layer, where: Tensor | None = None) -> Tensor:
    """`|w|` at these positions, or everywhere; -1 where a mask holds a zero already."""
    found = take(layer.weight, where).abs()
    mask = layer.threshold.mask
    if mask is not None:
        kept = mask.flatten() if where is None else mask.take(where)
        found = found.masked_fill(~kept, -1.0)
    return found
