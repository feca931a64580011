"""Random numbers that are a function of a key, so that an example does not depend on its batch.

All functions use integer arithmetic and exact conversions, so the numbers are the same on every
device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Draws", "bell_triples", "example_keys", "mix", "rough_uniform", "uniform"]

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def mix(x: Tensor) -> Tensor:
    """Hash int64 values to int64 values (the finaliser of SplitMix64)."""
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIER_2)
    return torch.bitwise_xor(x, _shift(x, 31))


def uniform(keys: Tensor) -> Tensor:
    """Hash int64 keys to float32 values in [0, 1), multiples of 2^-24."""
    return _shift(mix(keys), 40).to(torch.float32) * 2.0**-24


def rough_uniform(keys: Tensor) -> Tensor:
    """Like `uniform`, but with a weaker hash at half the cost. Meant for textures."""
    x = keys * _signed(_MULTIPLIER_1)
    x = (x ^ _shift(x, 29)) * _signed(_MULTIPLIER_2)
    return _shift(x, 40).to(torch.float32) * 2.0**-24


def bell_triples(keys: Tensor) -> Tensor:
    """Hash int64 keys to three bell-shaped values each, of mean 0 and variance 1: `(3, *shape)`.

    A value is the sum of four 5-bit numbers, so it lies within +-3.4 and takes 125 levels. It needs
    neither `log` nor `cos`, whose last bit depends on the position in the batch. The three sums
    are computed at once, in three lanes of one integer.
    """
    bits = mix(keys)
    lanes = 0x1F | 0x1F << 20 | 0x1F << 40
    total = bits & lanes
    for offset in (5, 10, 15):
        total = total + ((bits >> offset) & lanes)
    values = torch.stack([(total >> lane) & 0x7F for lane in (0, 20, 40)])
    deviation = math.sqrt(4 * (32**2 - 1) / 12)
    return (values.to(torch.float32) - 62) / deviation


def example_keys(seed: int, indices: Tensor) -> Tensor:
    """Make one int64 key for each example, from the seed of the data set and the indices."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=indices.device)
    return mix(mix(start + _signed(_GOLDEN)) + indices.to(torch.int64) * _signed(_GOLDEN))


class Draws:
    """A stream of uniform random numbers for each example. Each call returns the next ones.

    Args:
        keys: One int64 key for each example, `(B,)`.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._drawn = 0

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw float32 values `(B, *shape)` uniformly from [low, high)."""
        return low + self._next(*shape) * (high - low)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw int64 values `(B, *shape)` uniformly from 0, ..., high - 1."""
        return (self._next(*shape) * high).to(torch.int64).clamp(max=high - 1)

    def permutation(self, length: int) -> Tensor:
        """Draw a random order of 0, ..., length - 1 for each example, `(B, length)`."""
        return self._next(length).argsort(dim=1, stable=True)

    def _next(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        counters = torch.arange(self._drawn, self._drawn + count, device=self._keys.device)
        self._drawn += count
        keys = self._keys[:, None] + (counters + 1) * _signed(_GOLDEN)
        return uniform(keys).reshape(len(self._keys), *shape)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros."""
    # int64 shifts copy the sign bit; the mask clears the copies, as a logical shift does.
    mask = (1 << (64 - bits)) - 1
    shifted: Tensor = (x >> bits) & mask
    return shifted


def _signed(value: int) -> int:
    """The int64 value with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
