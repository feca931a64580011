"""The exact choice of weights against plain sorting of all of them, and what of them it sorts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sorting import Limits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adapmtl import Layer, Layers
from torch_adapmtl.layers import sampling
from torch_adapmtl.methods._exact import choose


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    """Samples of small layers, read in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLE", 400)
        patch.setattr(sampling, "LAYER_SAMPLE", 100)
        patch.setattr(sampling, "LARGE", 8)
        patch.setattr(sampling, "PIECE", 64)
        yield


def layers_of(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Layers:
    layers = []
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        module: Any = nn.Module()
        module.weight = nn.Parameter(weight)
        layer = Layer(f"{i}.weight", "shared", ((module, "weight"),))
        layer.threshold.mask = mask
        layers.append(layer)
    return Layers(layers)


def scores_of(layers: Layers, factors: Tensor) -> list[Tensor]:
    """The magnitudes times the factor, negative where a mask has pruned already."""
    scores = []
    for layer, factor in zip(layers, factors.tolist(), strict=True):
        score = layer.weight.detach().abs().float().flatten().mul(factor)
        mask = torch.ones_like(score).bool() if layer.mask is None else layer.mask.flatten()
        scores.append(score.masked_fill(~mask, -1.0))
    return scores


class Sorts(TorchDispatchMode):
    """Remembers the most numbers that were sorted at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "sort":
            self.most = max(self.most, args[0].numel())
        return func(*args, **(kwargs or {}))


def check(layers: Layers, factors: Tensor, limits: Limits) -> int:
    """Compare with plain sorting; return the most numbers that were sorted at once."""
    with torch.no_grad(), Sorts() as sorts:
        keep = choose(layers, factors, limits.bounds, limits.zeros)
    expected = limits.prune(scores_of(layers, factors))
    for found, gone in zip(keep, expected, strict=True):
        assert found.dtype == torch.bool
        assert found.tolist() == [not pruned for pruned in gone]
    return sorts.most


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -3e38]


@settings(max_examples=40)
@given(
    shapes=st.lists(
        st.sampled_from([(1,), (3, 5), (20, 13), (41, 20), (6, 7, 5, 5)]), min_size=1, max_size=4
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    values=st.sampled_from([None, 1, 3, 20]),
    special=st.sampled_from([0.0, 0.1, 1.0]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    spread=st.sampled_from([0.0, 2.0, 30.0]),
    bounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_is_plain_sorting(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, values: int | None, special: float,
    masked: float, spread: float, bounded: bool, seed: int,
) -> None:  # fmt: skip
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weights, masks = [], []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator)
        if values:  # ties
            weight = torch.randint(values, shape, generator=generator) / 4
        here = torch.rand(shape, generator=generator) < special
        drawn = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
        weights.append(torch.where(here, drawn, weight).to(dtype))
        mask = torch.rand(shape, generator=generator) >= masked
        masks.append(None if rng.random() < 0.3 else mask)
    factors = torch.tensor([math.exp(rng.uniform(-spread, spread)) for _ in shapes])
    layers = layers_of(weights, masks)
    check(layers, factors, Limits(rng, layers.sizes, bounded=bounded))


@pytest.mark.parametrize("bounded", [False, True])
def test_only_what_lies_near_the_level_is_sorted(bounded: bool) -> None:
    torch.manual_seed(0)
    layers = layers_of([torch.randn(60, 50), torch.randn(40, 50)], [None, None])
    limits = Limits(random.Random(0), layers.sizes, bounded=bounded)
    if not bounded:
        limits.zeros = 4000
    most = check(layers, torch.tensor([1.0, 0.5]), limits)
    assert 0 < most < 2500  # of 5000


def test_all_are_sorted_where_the_sample_was_not_a_fair_one() -> None:
    """The sampled places hold small weights only, so that the level looks far too low."""
    torch.manual_seed(0)
    weights = [torch.randn(60, 50), torch.randn(40, 50)]
    for weight in weights:
        places = sampling.positions(weight.numel(), 5000, weight.device, large=True)
        assert places is not None
        weight.view(-1)[places] *= 1e-4
    layers = layers_of(weights, [None, None])
    limits = Limits(random.Random(0), layers.sizes, bounded=False)
    limits.zeros = 2500
    assert check(layers, torch.tensor([1.0, 0.5]), limits) == 5000


def test_ties_longer_than_a_piece_go_in_storage_order() -> None:
    layers = layers_of([torch.full((40, 50), 0.25), torch.full((10, 10), 0.25)], [None, None])
    limits = Limits(random.Random(0), layers.sizes, bounded=False)
    for zeros in (0, 1, 777, 2000, 2001, 2100):
        limits.zeros = zeros
        check(layers, torch.ones(2), limits)
