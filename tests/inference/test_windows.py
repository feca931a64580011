"""Layers that read windows against torch, for every parameter of a window."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from skipping import (
    ACTIVATIONS,
    activations,
    assert_close,
    assert_zero_around,
    seeds,
    sparse,
    sparsities,
    vectors_of,
    widths,
)
from torch import Tensor, nn

from torch_adapmtl.inference._layers import MOST_PLANS, Activation
from torch_adapmtl.inference._map_modules import MapMaxPool2d
from torch_adapmtl.inference._maps import held
from torch_adapmtl.inference._transposed import SparseConvTranspose2d
from torch_adapmtl.inference._windows import SparseConv2d

MODES = ("zeros", "reflect", "replicate", "circular")

# Of torch, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@dataclass(frozen=True)
class Shape:
    """The parameters of a convolution, and of what it is given."""

    batch: int
    groups: int
    ins: int  # in each group
    outs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    sparsity: float
    bias: bool
    empty: bool  # whether a filter is all zeros

    def input(self) -> Tensor:
        return torch.randn(self.batch, self.groups * self.ins, *self.size)

    def weight(self) -> Tensor:
        outs = self.groups * self.outs
        weight = sparse(outs, self.ins, *self.kernel, sparsity=self.sparsity)
        if self.empty:
            weight[outs // 2] = 0
        return weight

    def own_bias(self) -> Tensor | None:
        return torch.randn(self.groups * self.outs) if self.bias else None


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kernel, dilation, padding = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(0, 3))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    more = draw(pairs(0, 25))
    return Shape(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        ins=draw(st.integers(1, 5)),
        outs=draw(st.integers(1, 6)),
        kernel=kernel,
        stride=draw(pairs(1, 3)),
        padding=padding,
        dilation=dilation,
        size=(least[0] + more[0], least[1] + more[1]),
        sparsity=draw(sparsities),
        bias=draw(st.booleans()),
        empty=draw(st.booleans()),
    )


@given(
    shapes(),
    activations,
    st.sampled_from(["none", "same", "a channel", "an image", "a map"]),
    widths,
    seeds,
)
@settings(max_examples=150)
def test_convolutions(shape: Shape, activation: str, added: str, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, bias = shape.input(), shape.weight(), shape.own_bias()
    window = (shape.stride, shape.padding, shape.dilation, shape.groups)
    expected = F.conv2d(x, weight, bias, *window)
    with vectors_of(width):
        residual = {
            "none": lambda: None,
            "same": lambda: torch.randn_like(expected),
            "a channel": lambda: torch.randn(expected.shape[1], 1, 1),
            "an image": lambda: (
                torch.randn(1, *expected.shape[1:]).transpose(1, 2).clone().transpose(1, 2)
            ),
            "a map": lambda: SparseConv2d(torch.randn(*expected.shape[1:2] * 2, 3, 3), None, 1, 1)(
                torch.randn_like(expected)
            ),
        }[added]()
        module = ACTIVATIONS[activation]()
        layer = SparseConv2d(weight, bias, *window, activation=Activation(module))
        found = layer(x) if residual is None else layer(x, residual)
        again = layer(x) if residual is None else layer(x, residual)
    expected = expected if residual is None else expected + residual
    assert_close(found, expected if module is None else module(expected))
    assert torch.equal(found, again)
    assert_zero_around(found)


@given(
    st.sampled_from(MODES),
    st.sampled_from(["numbers", "same", "valid"]),
    st.booleans(),
    st.booleans(),
    pairs(1, 4),
    pairs(8, 20),
    widths,
    seeds,
)
def test_padding_modes(
    mode: str,
    padding: str,
    flat: bool,
    batched: bool,
    kernel: tuple[int, int],
    size: tuple[int, int],
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    stride, dilation = (1, 1) if padding == "same" else (2, 1), (1, 2)
    given_padding: Any = (1, 2) if padding == "numbers" else padding
    used = [1] if flat else [0, 1]  # a 1-D convolution has the widths only
    pick = lambda pair: pair if isinstance(pair, str) else tuple(pair[i] for i in used)  # noqa: E731
    layer = (nn.Conv1d if flat else nn.Conv2d)(
        3,
        4,
        pick(kernel),
        pick(stride),
        pick(given_padding),
        pick(dilation),
        padding_mode=mode,
    ).requires_grad_(False)
    x = torch.randn(2, 3, *pick(size)) if batched else torch.randn(3, *pick(size))
    weight = layer.weight[:, :, None] if flat else layer.weight
    given_padding = (0, 2) if flat and padding == "numbers" else given_padding
    own_stride, own_dilation = ((1, stride[1]), (1, 2)) if flat else (stride, dilation)
    with vectors_of(width):
        own = SparseConv2d(
            weight, layer.bias, own_stride, given_padding, own_dilation, 1, mode, flat=flat
        )
        assert_close(own(x), layer(x))


@given(
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    kernel=pairs(1, 3),
    stride=pairs(1, 3),
    padding=pairs(0, 2),
    dilation=pairs(1, 2),
    size=pairs(1, 6),
    sparsity=sparsities,
    seed=seeds,
)
@settings(max_examples=30)
def test_convolutions_as_they_are_written_down(
    batch: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    sparsity: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ins, outs = 2, 2
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    assume(height > 0 and width > 0)
    x = torch.randn(batch, groups * ins, *size)
    weight, bias = (
        sparse(groups * outs, ins, *kernel, sparsity=sparsity),
        torch.randn(groups * outs),
    )
    expected = torch.empty(batch, groups * outs, height, width)
    for b, o, y, z in itertools.product(*map(range, expected.shape)):
        total = float(bias[o])
        for i, ky, kz in itertools.product(range(ins), *map(range, kernel)):
            row = y * stride[0] + ky * dilation[0] - padding[0]
            column = z * stride[1] + kz * dilation[1] - padding[1]
            if 0 <= row < size[0] and 0 <= column < size[1]:
                value = float(x[b, (o // outs) * ins + i, row, column])
                total += float(weight[o, i, ky, kz]) * value
        expected[b, o, y, z] = total
    found = SparseConv2d(weight, bias, stride, padding, dilation, groups)(x)
    assert_close(found, expected)


@given(
    groups=st.sampled_from([1, 1, 2]),
    channels=pairs(1, 5),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 2),
    dilation=pairs(1, 2),
    more=pairs(0, 2),
    size=pairs(1, 12),
    sparsity=sparsities,
    activation=activations,
    batched=st.booleans(),
    width=widths,
    seed=seeds,
)
@settings(max_examples=100)
def test_transposed_convolutions(
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    more: tuple[int, int],
    size: tuple[int, int],
    sparsity: float,
    activation: str,
    batched: bool,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    assume(all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)))
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(size, stride, padding, dilation, kernel, strict=True)
    ]
    assume(all(n > 0 for n in least))
    ins, outs = channels
    weight = sparse(groups * ins, outs, *kernel, sparsity=sparsity)
    bias, x = torch.randn(groups * outs), torch.randn(3, groups * ins, *size)
    x = x if batched else x[0]
    module = ACTIVATIONS[activation]()
    window = (stride, padding, more, groups, dilation)
    expected = F.conv_transpose2d(x, weight, bias, *window)
    with vectors_of(width):
        layer = SparseConvTranspose2d(weight, bias, *window, Activation(module))
        found = layer(x)
        sizes = layer(x, [n + min(m, s - 1) for n, m, s in zip(least, more, stride, strict=True)])
    assert_close(found, expected if module is None else module(expected))
    if held(found) is not None:
        assert_zero_around(found)
    if all(m < s for m, s in zip(more, stride, strict=True)):
        assert torch.equal(sizes, found)


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    dilation=pairs(1, 2),
    padding=pairs(0, 2),
    more=pairs(0, 20),
    margin=st.integers(0, 2),
    width=widths,
    seed=seeds,
)
@settings(max_examples=100)
def test_max_pooling(
    batch: int,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    more: tuple[int, int],
    margin: int,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [max(1, n) + m for n, m in zip(least, more, strict=True)]
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    x = torch.randn(batch, channels, *size)
    x[x > 1.5], x[x < -1.5] = math.nan, -math.inf
    with vectors_of(width):
        y = SparseConv2d(torch.eye(channels)[:, :, None, None], None)(x)
        own = MapMaxPool2d(pool)
        own.ask(margin, margin)
        found = own(y)
    torch.testing.assert_close(found, pool(x), rtol=0, atol=0, equal_nan=True)
    assert_zero_around(found)
    assert torch.equal(own(torch.ones_like(x)), pool(torch.ones_like(x)))


class Chain(nn.Module):
    """Layers one after the other, each a convolution (a window, a stride) or a pooling.

    A layer's output is added to those that have its shape: maps that were made with other margins.
    """

    def __init__(self, parts: list[tuple[int, int]], channels: int, sparsity: float) -> None:
        super().__init__()
        self.weights = [sparse(channels, channels, k, k, sparsity=sparsity) for k, _ in parts]
        self.strides = [stride for _, stride in parts]
        self.layers = nn.ModuleList(
            SparseConv2d(w, None, s, w.shape[2] // 2, activation=Activation(nn.ReLU()))
            for w, s in zip(self.weights, self.strides, strict=True)
        )

    def calibrate(self, on: bool) -> None:
        for layer in self.layers:
            assert isinstance(layer, SparseConv2d)
            layer.calibrating = on

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for layer, stride in zip(self.layers, self.strides, strict=True):
            found.append(layer(found[-1]))
            if stride == 1 and len(found) > 2 and found[-1].shape == found[-3].shape:
                found.append(layer(found[-1], found[-3]))
        return found[1:]

    def plain(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for weight, stride in zip(self.weights, self.strides, strict=True):

            def layer(x: Tensor, w: Tensor = weight, s: int = stride) -> Tensor:
                return F.conv2d(x, w, stride=s, padding=w.shape[2] // 2)

            found.append(layer(found[-1]).relu())
            if stride == 1 and len(found) > 2 and found[-1].shape == found[-3].shape:
                found.append((layer(found[-1]) + found[-3]).relu())
        return found[1:]


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 1, 2])), min_size=2, max_size=4
    ),
    st.lists(st.tuples(st.integers(1, 3), pairs(5, 16)), min_size=1, max_size=3),
    sparsities,
    widths,
    seeds,
)
def test_chains(
    parts: list[tuple[int, int]],
    sizes: list[tuple[int, tuple[int, int]]],
    sparsity: float,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    chain = Chain(parts, 3, sparsity)
    with vectors_of(width):
        for calibrating in (False, True, True, False):
            chain.calibrate(calibrating)
            for batch, size in sizes:
                x = torch.randn(batch, 3, *size)
                for found, plain in zip(chain(x), chain.plain(x), strict=True):
                    assert_close(found, plain)
                    assert_zero_around(found)


@given(shapes(), widths, seeds)
def test_it_does_not_matter_whether_the_input_shows_a_map(
    shape: Shape, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = shape.input()
    channels = x.shape[1]
    with vectors_of(width):
        first = SparseConv2d(sparse(channels, channels, 3, 3, sparsity=0.5), None, 1, 1)
        window = (shape.stride, shape.padding, shape.dilation, shape.groups)
        second = SparseConv2d(shape.weight(), shape.own_bias(), *window)
        for margin in (0, 1, 3):
            first.ask(margin, margin)
            y = first(x)
            assert held(y) is not None
            assert held(y.clone()) is None
            assert_close(second(y), second(y.clone()))


@given(shapes(), widths, seeds, st.booleans())
def test_a_skipped_zero_meets_no_nan_and_no_infinity(
    shape: Shape, width: int, seed: int, image: bool
) -> None:
    """All other weights do, and what they make of it is what torch makes of it."""
    torch.manual_seed(seed)
    x, weight = shape.input(), shape.weight()
    places = torch.rand_like(x)
    x[places < 0.02], x[places > 0.98], x[(places - 0.5).abs() < 0.01] = (
        math.nan,
        math.inf,
        -math.inf,
    )
    window = (shape.stride, shape.padding, shape.dilation, shape.groups)
    expected = F.conv2d(x.nan_to_num(0, 0, 0), weight, None, *window)
    # What is not finite reaches an output by the nonzeros: count by which, each kind by itself.
    for kind, value in (
        (x.isnan(), math.nan),
        (x == math.inf, math.inf),
        (x == -math.inf, -math.inf),
    ):
        up, down = (
            F.conv2d(kind.float(), w.float(), None, *window) for w in (weight > 0, weight < 0)
        )
        expected = expected + torch.where(up > 0, value, 0.0) + torch.where(down > 0, -value, 0.0)
    with vectors_of(width):
        found = SparseConv2d(weight, None, *window)(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    assert_close(found[finite], expected[finite])
    assert_zero_around(found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [4, 8, 16])
def test_activations_of_what_is_not_finite(activation: str, width: int) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, -3.0, 3.0, 1e30, -1e30, 7.0])
    x = values.expand(2, 1, 3, -1).clone()
    module = ACTIVATIONS[activation]()
    with vectors_of(width):
        layer = SparseConv2d(torch.ones(1, 1, 1, 1), None, activation=Activation(module))
        found = layer(x)
    if activation == "gelu":  # by its definition: with AVX-512, torch's of infinity is NaN
        x = x.double()
        expected = (x * torch.special.erfc(-x / math.sqrt(2)) / 2).float()
    else:
        expected = x if module is None else module(x.clone())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_sizes_are_planned_when_they_come_and_few_are_kept() -> None:
    layer = SparseConv2d(sparse(4, 3, 3, 3, sparsity=0.5), None, 1, 1)
    for n in range(1, 3 * MOST_PLANS):
        for _ in range(2):
            layer(torch.randn(1, 3, n, n))
        assert len(layer._plans) == min(n, MOST_PLANS)


def test_what_a_tensor_shows_is_forgotten_when_it_changes_shape() -> None:
    layer = SparseConv2d(torch.eye(4)[:, :, None, None], None)
    y = layer(torch.randn(1, 4, 6, 6))
    for changed in (y[:, :2], y[..., 1:], y.transpose(2, 3), y.clone(), y.detach()):
        assert held(changed) is None
    assert held(y) is not None
    y.t_() if y.dim() == 2 else y.transpose_(2, 3)
    assert held(y) is None
    assert_close(layer(y), y)


def test_writing_to_the_tensor_writes_to_the_map() -> None:
    layer = SparseConv2d(sparse(4, 4, 3, 3, sparsity=0.5), None, 1, 1)
    y = layer(torch.randn(2, 4, 6, 6))
    y += 1
    y[:, 1] = 5
    y[..., 0].mul_(2)
    assert_zero_around(y)
    assert_close(layer(y), layer(y.clone()))


def test_refusals() -> None:
    layer = SparseConv2d(sparse(4, 3, 3, 3, sparsity=0.5), None)
    with pytest.raises(
        ValueError, match=r"expected 3 channels, got an input of shape \(1, 2, 5, 5\)"
    ):
        layer(torch.randn(1, 2, 5, 5))
    with pytest.raises(
        ValueError, match=r"shape \(1, 3, 2, 5\) is smaller than the kernel of Spar"
    ):
        layer(torch.randn(1, 3, 2, 5))
    with pytest.raises(ValueError, match=r"3 or 4 dimensions, found one of shape \(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"float32 on a CPU, but its input is torch.float64 on cpu"):
        layer(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"float32 on a CPU, but its input is torch.float32 on meta"
    ):
        layer(torch.randn(1, 3, 5, 5, device="meta"))
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"computes no gradients, but its input requires them"):
        layer(x)
    with torch.no_grad():
        layer(x)
    transposed = SparseConvTranspose2d(torch.randn(3, 4, 2, 2), None, 2)
    with pytest.raises(ValueError, match=r"3 or 4 dimensions for a transposed convolution, found"):
        transposed(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"output_size is \(9, 12\).*between \(10, 10\) and \(11,"):
        transposed(torch.randn(1, 3, 5, 5), (9, 12))


def test_images_that_are_too_small_for_a_pool_get_the_error_of_torch() -> None:
    for x in (
        torch.randn(1, 4, 3, 3),
        SparseConv2d(torch.ones(4, 4, 1, 1), None)(torch.ones(1, 4, 3, 3)),
    ):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            MapMaxPool2d(nn.MaxPool2d(5))(x)


def test_a_map_that_is_too_large_is_refused() -> None:
    layer = SparseConv2d(torch.ones(1, 1, 1, 1), None)
    x = torch.zeros(1).expand(2**16, 1, 2**8, 2**8)
    with pytest.raises(ValueError, match=r"4,294,967,296 positions is too large for SparseConv2d"):
        layer(x)
