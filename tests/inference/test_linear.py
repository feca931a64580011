"""Linear layers that skip zeros against torch, on rows, tokens and images of tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skipping import (
    ACTIVATIONS,
    activations,
    assert_close,
    seeds,
    sparse,
    sparsities,
    vectors_of,
    widths,
)
from torch import nn

from torch_adapmtl.inference._layers import MOST_PLANS, Activation, SparseLinear
from torch_adapmtl.inference._maps import held

leadings = st.sampled_from([(), (1,), (7,), (33,), (2, 9), (196,), (3, 4, 5), (0,), (2, 0, 3)])
features = st.integers(1, 80)


@given(leadings, features, features, sparsities, st.booleans(), activations, widths, seeds)
@settings(max_examples=150)
def test_rows_and_tokens(
    leading: tuple[int, ...],
    ins: int,
    outs: int,
    sparsity: float,
    has_bias: bool,
    activation: str,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, x = sparse(outs, ins, sparsity=sparsity), torch.randn(*leading, ins)
    weight[outs // 2] = 0
    bias, module = torch.randn(outs) if has_bias else None, ACTIVATIONS[activation]()
    expected = F.linear(x, weight, bias)
    expected = expected if module is None else module(expected)
    with vectors_of(width):
        layer = SparseLinear(weight, bias, Activation(module))
        found = layer(x)
        assert_close(found, expected)
        assert found.is_contiguous()
        assert torch.equal(layer(x), found)
        layer.keeps_map = True  # as before a sparse layer, which reads the map
        shown = layer(x)
        assert torch.equal(shown, found)
        following = sparse(5, outs, sparsity=sparsity)
        assert_close(SparseLinear(following, None)(shown), F.linear(expected, following))


@given(features, features, widths, seeds)
@settings(max_examples=20)
def test_rows_as_they_are_written_down(ins: int, outs: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, bias, x = sparse(outs, ins, sparsity=0.8), torch.randn(outs), torch.randn(3, ins)
    expected = torch.empty(3, outs)
    for row in range(3):
        for o in range(outs):
            products = [float(weight[o, i]) * float(x[row, i]) for i in range(ins)]
            expected[row, o] = float(bias[o]) + math.fsum(products)
    with vectors_of(width):
        assert_close(SparseLinear(weight, bias)(x), expected)


@given(st.integers(1, 40), widths, seeds)
@settings(max_examples=20)
def test_inputs_may_lie_anyhow_in_memory(rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = sparse(6, 20, sparsity=0.5)
    with vectors_of(width):
        layer = SparseLinear(weight, None)
        wide = torch.randn(rows, 50)
        for x in (
            wide[:, 7:27],
            wide[:, ::2][:, 2:22],
            torch.randn(20, rows).t(),
            torch.randn(20).expand(rows, 20),
            torch.randn(2, 20, rows).transpose(1, 2),
            torch.randn(rows, 20, 3).permute(2, 0, 1),
        ):
            assert_close(layer(x), F.linear(x, weight))


@given(widths, seeds)
@settings(max_examples=20)
def test_a_skipped_zero_meets_no_nan_and_no_infinity(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = sparse(20, 30, sparsity=0.8), torch.randn(40, 30)
    x[torch.rand_like(x) < 0.02] = math.nan
    x[torch.rand_like(x) < 0.02] = math.inf
    products = torch.where(weight == 0, 0.0, weight * x[:, None])
    with vectors_of(width):
        found = SparseLinear(weight, None)(x)
    torch.testing.assert_close(found, products.sum(2), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.isfinite().any()


def test_sizes_are_planned_when_they_come_and_few_are_kept() -> None:
    layer = SparseLinear(sparse(4, 3, sparsity=0.5), None)
    for n in range(1, 3 * MOST_PLANS):
        for _ in range(2):
            layer(torch.randn(n, 3))
        assert len(layer._plans) == min(n, MOST_PLANS)


@pytest.mark.parametrize(("ins", "outs"), [(0, 4), (4, 0), (0, 0)])
def test_layers_without_weights(ins: int, outs: int) -> None:
    bias, x = torch.randn(outs), torch.randn(3, ins)
    layer = SparseLinear(torch.empty(outs, ins), bias, Activation(nn.ReLU()))
    assert torch.equal(layer(x), bias.relu().expand(3, outs))


def test_a_map_of_as_many_tokens_is_no_map_of_an_image() -> None:
    first, second = SparseLinear(torch.eye(6), None), SparseLinear(torch.eye(6), None)
    first.keeps_map = True
    y = first(torch.randn(2, 8, 6))
    assert held(y) is not None
    # The first is read as it is; the other tokens lie elsewhere.
    assert torch.equal(second(y), y)
    assert torch.equal(second(y.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(second(y[:, ::2]), y[:, ::2])


def test_refusals() -> None:
    layer = SparseLinear(sparse(4, 3, sparsity=0.5), None)
    with pytest.raises(ValueError, match=r"expected 3 features, got an input of shape \(5, 2\)"):
        layer(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"expected 3 features, got an input of shape \(\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(
        TypeError, match=r"SparseLinear computes float32 on a CPU, but its input is "
    ):
        layer(torch.randn(5, 3, dtype=torch.float16))
    with pytest.raises(
        RuntimeError, match=r"SparseLinear computes no gradients, but its input requ"
    ):
        layer(torch.randn(5, 3, requires_grad=True))


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish()])
@pytest.mark.parametrize("width", [4, 8, 16])
def test_activations_over_their_range(module: nn.Module, width: int) -> None:
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.linspace(-200, 200, 2_001)])[:, None]
    with vectors_of(width):
        found = SparseLinear(torch.ones(1, 1), None, Activation(module))(x)
    exact = module(x.double())
    assert float(((found - exact).abs() / (1 + exact.abs())).max()) < 3e-7
