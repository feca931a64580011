"""What lies between sparse layers, on maps and on other tensors, against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from skipping import assert_close, assert_zero_around, seeds, sparse, vectors_of, widths
from torch import Tensor, nn

from torch_adapmtl.inference import _elementwise
from torch_adapmtl.inference._map_modules import (
    MapActivation,
    MapMean,
    MapNorm2d,
    MapUpsample,
    Norm,
)
from torch_adapmtl.inference._maps import contiguous, held
from torch_adapmtl.inference._windows import SparseConv2d


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    return tuple(draw(st.integers(1, most)) for most in (3, 6, 18, 18))  # type: ignore[return-value]


def shown(x: Tensor, margin: int) -> Tensor:
    """The same values, as a layer shows them that leaves that many zeros around."""
    layer = SparseConv2d(torch.eye(x.shape[1])[:, :, None, None], None)
    layer.ask(margin, margin)
    return layer(x)


def check(found: Any, expected: Tensor) -> None:
    assert_close(found, expected)
    if held(found) is not None:
        assert_zero_around(found)
    plain = contiguous(found)
    assert held(plain) is None or plain is found
    assert plain.is_contiguous()


@given(sizes(), st.integers(0, 2), st.integers(0, 2), widths, seeds)
def test_on_maps_and_other_tensors(
    size: tuple[int, int, int, int], first: int, second: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    p, q, gate = torch.randn(size), torch.randn(size), torch.randn(*size[:2], 1, 1)
    with vectors_of(width):
        for x in (p, shown(p, first)):
            for y in (q, shown(q, second)):
                check(_elementwise.add(x, y), p + q)
                check(_elementwise.multiply(x, y), p * q)
                check(_elementwise.concatenate([x, y, x]), torch.cat([p, q, p], 1))
            check(_elementwise.multiply(x, gate), p * gate)
            check(_elementwise.multiply(gate, x), p * gate)
            check(_elementwise.multiply(x, 2), p * 2)
            check(_elementwise.add(x, gate), p + gate)
            check(_elementwise.add(1.5, x), p + 1.5)
            check(_elementwise.mean(x), p.mean((2, 3)))
            check(_elementwise.mean(x, keepdim=True), p.mean((2, 3), keepdim=True))
            check(MapMean()(x), p.mean((2, 3), keepdim=True))
            for settings in ({"scale_factor": 2}, {"scale_factor": 1.5}, {"size": (5, 7)}):
                check(MapUpsample()(x, **settings), F.interpolate(p, **settings))
            up = nn.Upsample(scale_factor=2)
            check(MapUpsample(up)(x), up(p))
            for module in (nn.SiLU(), nn.GELU()):
                check(MapActivation(module)(x), module(p))
            norm = Norm(torch.randn(size[1]), torch.rand(size[1]) + 0.5, 1e-5, None, None)
            expected = F.batch_norm(p, norm.mean, norm.variance)
            check(MapNorm2d(norm, None)(x), expected)
            check(MapNorm2d(norm, nn.Hardswish())(x), F.hardswish(expected))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_factors_that_are_not_finite_leave_the_zeros_around(value: float) -> None:
    p, gate = torch.rand(2, 3, 5, 5), torch.ones(2, 3, 1, 1)
    gate[1, 2] = value
    x = shown(p, 1)
    found = _elementwise.multiply(x, gate)
    torch.testing.assert_close(found, p * gate, equal_nan=True)
    if held(found) is not None:
        assert_zero_around(found)
    layer = SparseConv2d(sparse(3, 3, 3, 3, sparsity=0), None, 1, 1)
    torch.testing.assert_close(layer(found), layer(found.clone()), equal_nan=True)


def test_an_activation_in_place_changes_the_tensor_that_it_is_given() -> None:
    x = shown(torch.randn(2, 3, 5, 5), 1)
    expected = x.relu()
    y = MapActivation(nn.ReLU(inplace=True))(x)
    assert y is x
    assert torch.equal(x, expected)
    assert_zero_around(x)


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("size", [(16, 1, 1), (4, 2, 2), (8, 1, 2), (1, 4, 4), (3, 2, 2)])
def test_factors_of_small_images(size: tuple[int, int, int], width: int) -> None:
    batch, height, so_wide = size
    x, gate = torch.randn(batch, 8, height, so_wide), torch.randn(batch, 8, 1, 1)
    gate[0, 0] = math.inf
    with vectors_of(width):
        for margin in (0, 1):
            y = _elementwise.multiply(shown(x, margin), gate)
            torch.testing.assert_close(contiguous(y), x * gate, equal_nan=True)
            assert_zero_around(y)


def test_the_mean_of_many_equal_numbers() -> None:
    x = shown(torch.full((1, 1, 512, 512), 0.1), 0)
    assert float(_elementwise.mean(x)) == pytest.approx(0.1, rel=1e-6)
