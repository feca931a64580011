"""Dynamic sparse training: the densities of the layers, and the step that moves a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from torch_adapmtl.methods._lowest import lowest

__all__ = ["cosine_share", "drop_and_grow", "erk_densities", "erk_numbers", "random_mask"]


def erk_densities(
    shapes: Sequence[Sequence[int]],
    kept: float,
    capacities: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> list[Fraction]:
    """The density of each layer by the Erdos-Renyi-Kernel rule (RigL, arXiv 1911.11134, Section 3).

    The density is in proportion to the sum of the dimensions divided by their product, and at most
    1. What a layer cannot hold goes to the others, in the same proportion.

    Args:
        shapes: The shape of each layer's weight.
        kept: What remains: the total of density, size and cost over the layers, which is exact.
        capacities: The most weights that each layer can keep; all of them if None.
        costs: What a weight of each layer counts; 1 if None.

    Returns:
        The densities, without rounding errors.
    """
    sizes = [math.prod(shape) for shape in shapes]
    # The size times the sum of the dimensions over their product.
    shares = [sum(shape) for shape in shapes]
    most = list(sizes if capacities is None else capacities)
    prices = [Fraction(cost) for cost in (costs or [1] * len(sizes))]
    numbers = [Fraction(0)] * len(sizes)
    rest, free = Fraction(kept), list(range(len(sizes)))
    while free:
        scale = rest / sum(shares[i] * prices[i] for i in free)
        full = [i for i in free if scale * shares[i] >= most[i]]
        for i in full or free:
            numbers[i] = min(Fraction(most[i]), scale * shares[i])
            rest -= numbers[i] * prices[i]
        free = [i for i in free if i not in full] if full else []
    return [number / size for number, size in zip(numbers, sizes, strict=True)]


def erk_numbers(
    shapes: Sequence[Sequence[int]],
    kept: float,
    capacities: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> list[int]:
    """The number of weights that each layer keeps by `erk_densities`.

    The numbers are rounded by the largest remainders. If all costs are 1, their sum is `kept`;
    otherwise their cost is below it by less than the largest cost.
    """
    densities = erk_densities(shapes, kept, capacities, costs)
    sizes = [math.prod(shape) for shape in shapes]
    prices = [Fraction(cost) for cost in (costs or [1] * len(sizes))]
    exact = [density * size for density, size in zip(densities, sizes, strict=True)]
    numbers = [math.floor(number) for number in exact]
    rest = sum(
        ((a - b) * price for a, b, price in zip(exact, numbers, prices, strict=True)), Fraction(0)
    )
    for i in sorted(range(len(sizes)), key=lambda i: numbers[i] - exact[i]):
        if numbers[i] < exact[i] and prices[i] <= rest:
            numbers[i] += 1
            rest -= prices[i]
    return numbers


def random_mask(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mark `count` of the allowed weights at random.

    Args:
        allowed: Flat, bool.
        count: How many.
        generator: On the CPU, so that the choice does not depend on the device.
    """
    draw = torch.rand(allowed.numel(), generator=generator, device="cpu", dtype=torch.float32)
    draw = draw.to(allowed.device).masked_fill(~allowed, torch.inf)
    return lowest([draw], count)[0]


def cosine_share(fraction: float, step: int, end: float) -> float:
    """The share of the weights that moves: `fraction / 2 * (1 + cos(pi * step / end))`."""
    return fraction / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def drop_and_grow(
    magnitude: Tensor, gradient: Tensor, kept: Tensor, allowed: Tensor, share: float
) -> Tensor:
    """Drop the smallest of the kept weights, and grow those with the largest gradients.

    As many grow as are dropped. A weight that was just dropped may grow again, as in Algorithm 1 of
    RigL. Among equal values the first weights move.

    Args:
        magnitude: The magnitudes, flat, as all other tensors.
        gradient: The dense gradient; what is not a number counts as zero.
        kept: Which weights the mask keeps, bool.
        allowed: Which weights may be kept, bool; it contains `kept`.
        share: The share of the kept weights that is dropped, rounded down.

    Returns:
        Which weights the new mask keeps, bool.
    """
    count = int(share * int(kept.sum()))
    size = magnitude.float().nan_to_num(nan=torch.inf).masked_fill(~kept, torch.inf)
    remaining = kept & ~lowest([size], count)[0]
    # -1 is a score that no gradient has, so that other weights are taken first.
    pull = gradient.abs().float().nan_to_num(nan=0.0, posinf=torch.inf)
    pull = pull.masked_fill(remaining | ~allowed, -1.0)
    return remaining | lowest([-pull], count)[0]
