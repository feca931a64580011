"""A uniform sample of the layers' weights, so that an update does not read all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_adapmtl._distributed import whole
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer

__all__ = ["Sample", "magnitudes", "positions", "take"]

# Number of weights that an update reads. A smaller model is read entirely. In a larger one, the
# error of the overall sparsity (one standard deviation at 90 %) is below 0.1 % of the weights.
SAMPLE = 2**17
# Smallest number of weights sampled in a layer.
LAYER_SAMPLE = 1024
# When the zeros are fixed, one weight in this many is sampled. The larger the sample, the fewer of
# the other weights must be sorted.
LARGE = 32
# Number of weights read at once on a CPU, so that intermediate results stay in a core's cache.
PIECE = 2**17


@dataclass(frozen=True)
class Sample:
    """Magnitudes of the layers' weights, or of a sample of them.

    Attributes:
        values: `|w|`, float32, flat, concatenated over the layers; -1 for zeros that a mask fixes.
        lengths: The number of values of each layer.
        weights: How many weights of its layer each value represents, by layer, float64 (L,).
    """

    values: Tensor
    lengths: list[int]
    weights: Tensor

    @staticmethod
    def draw(layers: Layers, *, large: bool = False) -> Sample:
        """Read the sampled weights, or all weights of a small model.

        Args:
            layers: The layers.
            large: Whether to sample one weight in 32, however large the model.
        """
        device = layers.device
        parts = [
            _sampled(layer, positions(size, layers.total, layer.weight.device, large=large)).to(
                device
            )
            for layer, size in zip(layers, layers.sizes, strict=True)
        ]
        lengths = [len(part) for part in parts]
        length = torch.tensor(lengths, device=device)
        weights = torch.tensor(layers.sizes, device=device) / length.double()
        return Sample(torch.cat(parts), lengths, weights)


def positions(size: int, total: int, device: torch.device, *, large: bool = False) -> Tensor | None:
    """Return the positions to sample in a layer, evenly spread and deterministic; None for all.

    Args:
        size: Number of weights of the layer.
        total: Number of weights of all layers.
        device: The device of the positions.
        large: Whether to sample one weight in 32, however large the model.
    """
    if total <= SAMPLE:
        return None
    wanted = max(LAYER_SAMPLE, size // LARGE if large else round(size / total * SAMPLE))
    if wanted >= size:
        return None
    spread = _spread if large else _cached_spread  # a large sample is used only once
    return spread(size, wanted, device)


def _spread(size: int, wanted: int, device: torch.device) -> Tensor:
    # One position in each of `wanted` equal intervals. Its place in the interval varies, so that
    # the sample does not follow rows or channels.
    number = torch.arange(wanted + 1, device=device)
    start = (number * size).div_(wanted, rounding_mode="floor")
    inside = (number[:-1].double() * 0.6180339887498949).frac()
    return start[:-1] + (inside * start.diff()).long()


_cached_spread = lru_cache(maxsize=4096)(_spread)  # layers; about a megabyte for a model


def take(tensor: Tensor, where: Tensor | None) -> Tensor:
    """Return the entries at these positions, or all entries, float32 and flat."""
    tensor = whole(tensor.detach())
    return (tensor.flatten() if where is None else tensor.take(where)).float()


def _sampled(layer: Layer, where: Tensor | None) -> Tensor:
    values = take(layer.weight, where).abs()
    if (mask := layer.mask) is not None:
        kept = mask.flatten() if where is None else mask.take(where)
        values = values.masked_fill(~kept, -1.0)
    return values


def magnitudes(layer: Layer) -> Iterator[Tensor]:
    """Yield `|w|` of all weights of a layer in pieces, float32 and flat.

    The value is -1 for zeros that a mask fixes, and infinity for NaN.
    """
    weight, mask = layer.values().flatten(), layer.mask
    size = PIECE if weight.device.type == "cpu" else max(len(weight), 1)
    masks = itertools.repeat(None) if mask is None else mask.flatten().split(size)
    for part, kept in zip(weight.split(size), masks, strict=False):
        values = part.abs().float().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        yield values if kept is None else values.masked_fill_(~kept, -1.0)
