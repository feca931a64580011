"""The function: `soft_threshold` against the plain formula, and what its backward keeps."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from refusals import Error, raises
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from torch_adapmtl import soft_threshold

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
broadcast = pytest.mark.parametrize(
    ("weight_shape", "alpha_shape"),
    [((3, 4), ()), ((3, 4), (1,)), ((3, 4), (3, 1)), ((2, 3, 4), (3, 1)), ((5,), (5,)), ((), ())],
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def plain(weight: Tensor, alpha: Tensor) -> Tensor:
    """The paper's formula, word for word."""
    return weight.sign() * (weight.abs() - alpha.to(weight.dtype)).relu()


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def away_from_kink(shape: tuple[int, ...], alpha: Tensor, margin: float = 0.05) -> Tensor:
    """Weights on both sides of the threshold, none near it or near zero."""
    weight = torch.randn(shape, dtype=alpha.dtype)
    inside = weight.sign() * torch.clamp(alpha / 2, min=margin)
    near = (weight.abs() - alpha).abs() < margin
    return torch.where(near | (weight.abs() < margin), inside, weight)


def saved_by(build: Any) -> tuple[list[Tensor], Tensor]:
    """What autograd keeps for the backward of `build()`."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        output = build()
    return kept, output


@given(shape=shapes, dtype=dtypes, value=st.floats(0, 3), seed=seeds, as_tensor=st.booleans())
def test_shrinks_towards_zero_and_keeps_sign(
    shape: tuple[int, ...], dtype: torch.dtype, value: float, seed: int, as_tensor: bool
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    alpha = torch.tensor(value, dtype=dtype)
    sparse = soft_threshold(weight, alpha if as_tensor else value)
    assert sparse.dtype == dtype
    assert sparse.shape == weight.shape
    assert torch.equal(sparse.abs(), (weight.abs() - alpha).clamp(min=0))
    assert torch.equal(sparse.sign(), weight.sign() * (weight.abs() > alpha))
    assert torch.equal(sparse, plain(weight, alpha))


@broadcast
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_are_those_of_the_plain_formula(
    weight_shape: tuple[int, ...], alpha_shape: tuple[int, ...], straight_through: bool
) -> None:
    alpha = (torch.rand(alpha_shape, dtype=torch.float64) + 0.2).requires_grad_()
    weight = away_from_kink(weight_shape, alpha.detach()).requires_grad_()
    grad = torch.randn(weight_shape, dtype=torch.float64)
    ours = torch.autograd.grad(
        soft_threshold(weight, alpha, straight_through=straight_through), (weight, alpha), grad
    )
    oracle = torch.autograd.grad(plain(weight, alpha), (weight, alpha), grad)
    torch.testing.assert_close(ours[0], grad if straight_through else oracle[0])
    torch.testing.assert_close(ours[1], oracle[1])


@given(dtype=dtypes, seed=seeds, trained=st.sets(st.sampled_from(["weight", "alpha"]), min_size=1))
def test_gradients_in_every_dtype(dtype: torch.dtype, seed: int, trained: set[str]) -> None:
    torch.manual_seed(seed)
    alpha = torch.tensor(0.5, dtype=dtype)
    weight = away_from_kink((4, 3), alpha)
    weight.requires_grad_("weight" in trained)
    alpha.requires_grad_("alpha" in trained)
    inputs = [t for t in (weight, alpha) if t.requires_grad]
    grad = torch.randn(4, 3).to(dtype)
    ours = torch.autograd.grad(soft_threshold(weight, alpha), inputs, grad)
    oracle = torch.autograd.grad(plain(weight, alpha), inputs, grad)
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, theirs)


@given(dtype=dtypes, seed=seeds, value=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 1e6]))
def test_a_known_threshold_passes_the_gradients_of_a_tensor(
    dtype: torch.dtype, seed: int, value: float
) -> None:
    torch.manual_seed(seed)
    alpha = torch.tensor(min(value, torch.finfo(dtype).max), dtype=dtype)
    near = torch.stack([alpha, -alpha, *(alpha * scale for scale in (0.5, 0.99, 1.01, -0.99))])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    below = (alpha.view(bits) - 1).view(dtype)[None] if value else near[:0]
    special = torch.tensor([0.0, math.inf, -math.inf], dtype=dtype)
    weight = torch.cat([near, below, -below, special, torch.randn(50).to(dtype)]).requires_grad_()
    grad = torch.randn_like(weight)
    grad[::7] = math.nan
    known, tensor = (
        torch.autograd.grad(soft_threshold(weight, a), weight, grad)[0] for a in (value, alpha)
    )
    torch.testing.assert_close(known, tensor, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(known == 0, (weight.abs() < alpha) | (grad == 0))


@broadcast
@pytest.mark.parametrize("fast", [False, True])
def test_gradcheck(weight_shape: tuple[int, ...], alpha_shape: tuple[int, ...], fast: bool) -> None:
    alpha = (torch.rand(alpha_shape, dtype=torch.float64) + 0.2).requires_grad_()
    weight = away_from_kink(weight_shape, alpha.detach()).requires_grad_()
    assert gradcheck(soft_threshold, (weight, alpha), fast_mode=fast)
    assert gradgradcheck(soft_threshold, (weight, alpha), fast_mode=fast)
    weight = away_from_kink((6,), torch.tensor(0.3, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda w: soft_threshold(w, 0.3), (weight,), fast_mode=fast)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("size", [1, 4, 64, 67])  # vectorised and scalar kernels
def test_zero_is_the_identity_bit_for_bit(dtype: torch.dtype, as_tensor: bool, size: int) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([-0.0, 0.0, math.inf, -math.inf, tiny, -tiny, -1.5, 7.0])
    weight = special.repeat(9)[:size].to(dtype)
    for w in (weight, weight.flip(0)):
        sparse = soft_threshold(w, torch.zeros((), dtype=dtype) if as_tensor else 0.0)
        assert torch.equal(bits(sparse), bits(w))
    assert soft_threshold(torch.tensor([math.nan], dtype=dtype), 0.0).isnan().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, torch.tensor(0.0), torch.tensor(0.5)])
def test_nan_and_infinity_pass(dtype: torch.dtype, alpha: float | Tensor) -> None:
    weight = torch.tensor([math.nan, math.inf, -math.inf] * 7, dtype=dtype)
    torch.testing.assert_close(soft_threshold(weight, alpha), weight, equal_nan=True)


def test_threshold_beyond_the_dtype_prunes_everything() -> None:
    weight = torch.tensor([65504.0, -1.0], dtype=torch.float16)
    for alpha in (1e6, torch.tensor(1e6)):
        assert not soft_threshold(weight, alpha).any()


@given(dtype=dtypes, seed=seeds, pair=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_sparsity_is_monotone(dtype: torch.dtype, seed: int, pair: tuple[float, float]) -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    low, high = (soft_threshold(weight, alpha) != 0 for alpha in sorted(pair))
    assert not (high & ~low).any()


def test_straight_through_lets_pruned_weights_return() -> None:
    weight = torch.tensor([0.1, -2.0], requires_grad=True)
    soft_threshold(weight, 0.5, straight_through=True).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]
    weight.grad = None
    soft_threshold(weight, 0.5).sum().backward()
    assert weight.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, torch.tensor(0.0)])
def test_zero_weights_learn_while_the_threshold_is_zero(alpha: float | Tensor) -> None:
    weight = torch.zeros(3, requires_grad=True)
    soft_threshold(weight, alpha).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]


def test_kink_belongs_to_the_weight_and_not_to_alpha() -> None:
    weight, alpha = (
        torch.tensor([0.5, -0.5], requires_grad=True),
        torch.tensor(0.5).requires_grad_(),
    )
    soft_threshold(weight, alpha).sum().backward()
    assert weight.grad is not None
    assert alpha.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]
    assert alpha.grad.item() == 0.0


def test_negative_threshold_acts_as_zero_and_can_rise_again() -> None:
    weight, alpha = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor(-0.1, requires_grad=True)
    sparse = soft_threshold(weight, alpha)
    assert torch.equal(sparse, weight)
    (sparse * weight).sum().backward()
    assert alpha.grad == -3.0


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_keeps_only_the_parameter_and_alpha(straight_through: bool, learned: bool) -> None:
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    alpha = torch.tensor(0.1, requires_grad=learned)
    kept, _ = saved_by(lambda: soft_threshold(weight, alpha, straight_through=straight_through))
    wanted = [] if straight_through and not learned else [weight, alpha]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in wanted]


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("alpha", [0.1, torch.tensor(0.1)])
def test_only_the_sparse_weight_stays_alive(straight_through: bool, alpha: float | Tensor) -> None:
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    image = torch.randn(1, 8, 5, 5)

    def convolve() -> Tensor:
        return F.conv2d(image, soft_threshold(weight, alpha, straight_through=straight_through))

    kept, _ = saved_by(convolve)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for known in (weight, image):
        storages.pop(known.untyped_storage().data_ptr(), None)
    large = [size for size in storages.values() if size > 64]
    assert large == [weight.numel() * 4]  # the sparse weight, which any convolution saves


def outputs_and_gradients(function: Any, weight: Tensor, *args: Any) -> list[Tensor]:
    weight = weight.detach().requires_grad_()
    trained = [weight, *(a for a in args if isinstance(a, Tensor) and a.requires_grad)]
    output = function(weight, *args)
    return [output, *torch.autograd.grad(output.square().sum(), trained)]


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5, requires_grad=True), torch.tensor(0.0)])
def test_compiles_without_a_graph_break(alpha: float | Tensor, straight_through: bool) -> None:
    def function(weight: Tensor, alpha: float | Tensor) -> Tensor:
        return soft_threshold(weight, alpha, straight_through=straight_through) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weight = torch.randn(5, 4)
    eager = outputs_and_gradients(function, weight, alpha)
    for mine, theirs in zip(outputs_and_gradients(compiled, weight, alpha), eager, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # 2.6, likewise
def test_inductor_equals_eager() -> None:
    compiled = torch.compile(soft_threshold, fullgraph=True)
    weight = torch.cat([torch.randn(30), torch.tensor([-0.0, math.inf])])
    for value in (0.0, 0.5):
        alpha = torch.tensor(value)
        assert torch.equal(bits(compiled(weight, alpha)), bits(soft_threshold(weight, alpha)))


@pytest.mark.parametrize("straight_through", [False, True])
def test_functional_transforms(straight_through: bool) -> None:
    def loss(weight: Tensor, alpha: Tensor) -> Tensor:
        return soft_threshold(weight, alpha, straight_through=straight_through).square().sum()

    weights, alphas = torch.randn(4, 3, 2), torch.rand(4)
    transformed = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(weights, alphas)
    for i in range(4):
        w, a = weights[i].clone().requires_grad_(), alphas[i].clone().requires_grad_()
        for mine, theirs in zip(transformed, torch.autograd.grad(loss(w, a), (w, a)), strict=True):
            torch.testing.assert_close(mine[i], theirs)
    for dims in ((0, None), (None, 0)):
        w, a = weights if dims[0] == 0 else weights[0], alphas if dims[1] == 0 else alphas[0]
        each = torch.func.vmap(soft_threshold, in_dims=dims)(w, a)
        pairs = ((w if w.ndim == 2 else w[i], a if a.ndim == 0 else a[i]) for i in range(4))
        assert torch.equal(each, torch.stack([plain(*pair) for pair in pairs]))
    assert torch.equal(
        torch.func.vmap(lambda w: soft_threshold(w, 0.5))(weights), soft_threshold(weights, 0.5)
    )


def test_forgotten_backward_after_a_move_is_an_error_not_a_wrong_gradient() -> None:
    weight, alpha = torch.randn(3, requires_grad=True), torch.tensor(0.1)
    sparse = soft_threshold(weight, alpha)
    alpha.fill_(0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sparse.sum().backward()


def test_on_each_device(device: torch.device, dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 5).to(device, dtype)
    for alpha in (0.0, 0.25, torch.tensor(0.25, device=device)):
        want = plain(layer.weight, torch.as_tensor(alpha, device=device))
        assert torch.equal(soft_threshold(layer.weight, alpha), want)


# --- firm thresholding ---------------------------------------------------------------------------


def plain_firm(weight: Tensor, alpha: float, reach: float) -> Tensor:
    """The formula by cases (Gao and Bruce, 1997), in float64."""
    size = weight.double().abs()
    rising = reach * alpha * (size - alpha) / (reach * alpha - alpha) if alpha else size
    size = torch.where(size <= alpha, 0.0, torch.where(size <= reach * alpha, rising, size))
    return size.copysign(weight.double())


@given(
    shape=shapes, dtype=dtypes, value=st.floats(0, 3), reach=st.floats(1.1, 4), seed=seeds,
    as_tensor=st.booleans(),
)  # fmt: skip
def test_firm_is_the_formula_by_cases(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    value: float,
    reach: float,
    seed: int,
    as_tensor: Any,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    alpha = torch.tensor(value, dtype=dtype)
    sparse = soft_threshold(weight, alpha if as_tensor else value, reach=reach)
    assert sparse.dtype == dtype
    expected = plain_firm(weight, alpha.item(), reach)
    slack = 8 * torch.finfo(dtype).eps * reach / (reach - 1)
    torch.testing.assert_close(sparse.double(), expected, rtol=slack, atol=4 * slack)
    # The same weights are pruned as by the soft threshold.
    assert torch.equal(sparse == 0, soft_threshold(weight, alpha) == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_firm_with_a_threshold_of_zero_is_the_identity(dtype: torch.dtype, as_tensor: bool) -> None:
    weight = torch.tensor([0.0, -0.0, 1.5, -2.7, math.inf, -math.inf, math.nan], dtype=dtype)
    alpha: Any = torch.tensor(0.0, dtype=dtype) if as_tensor else 0.0
    found = soft_threshold(weight, alpha, reach=1.5)
    assert torch.equal(bits(found)[:-1], bits(weight)[:-1])
    assert found[-1].isnan()


def test_firm_in_pieces_is_firm_at_once() -> None:
    weight = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    whole = soft_threshold(weight, 0.7, reach=1.5)  # more than a piece
    rows = [soft_threshold(row, 0.7, reach=1.5) for row in weight]  # less than one
    assert torch.equal(whole, torch.stack(rows))
    assert torch.equal(whole.t(), soft_threshold(weight.t(), 0.7, reach=1.5))  # not contiguous


@pytest.mark.parametrize("straight_through", [False, True])
def test_firm_has_the_gradients_of_the_soft_threshold(straight_through: bool) -> None:
    found = []
    for reach in (math.inf, 1.5):
        weight = torch.linspace(-2, 2, 41, requires_grad=True)
        alpha = torch.tensor(0.72, requires_grad=True)
        sparse = soft_threshold(weight, alpha, reach=reach, straight_through=straight_through)
        found.append(torch.autograd.grad((sparse * torch.arange(41)).sum(), (weight, alpha)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# --- what is refused ----------------------------------------------------------------------------

W = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("weight", "alpha", "options", "error", "named", "found", "remedy"),
    [
        (W, -0.1, {}, ValueError, "alpha", "got -0.1", ">= 0"),
        (W, math.nan, {}, ValueError, "alpha", "got nan", "finite"),
        (W, math.inf, {}, ValueError, "alpha", "got inf", "finite"),
        (W, "high", {}, TypeError, "alpha", "'high'", "be a number"),
        (W, True, {}, TypeError, "alpha", "True", "be a number"),
        (W, torch.ones(1, 3, 4), {}, ValueError, "alpha", "shape (1, 3, 4)", "(3, 4)"),
        (W, torch.ones(3), {}, ValueError, "alpha", "shape (3,)", "broadcast to"),
        (W, torch.tensor(1), {}, TypeError, "alpha", "torch.int64", "weight.dtype"),
        (W, torch.tensor(1j), {}, TypeError, "alpha", "torch.complex64", "cast it"),
        (W, torch.ones((), device="meta"), {}, ValueError, "alpha", "on meta", ".to('cpu')"),
        ([1.0], 0.1, {}, TypeError, "weight", "got list", "be a tensor"),
        (W.int(), 0.1, {}, TypeError, "weight", "torch.int32", "float32"),
        (W.cfloat(), 0.1, {}, TypeError, "weight", "torch.complex64", "float32"),
        (W.to_sparse(), 0.1, {}, TypeError, "weight", "sparse_coo", "(.to_dense())"),
        (W, 0.1, {"reach": 1.0}, ValueError, "reach", "got 1.0", "above 1"),
        (W, 0.1, {"reach": -1.0}, ValueError, "reach", "got -1.0", "above 1"),
        (W, 0.1, {"reach": math.nan}, ValueError, "reach", "got nan", "above 1"),
        (W, 0.1, {"reach": torch.tensor(2.0)}, TypeError, "reach", "tensor(2.", "be a number"),
    ],
    ids=lambda value: None if isinstance(value, Tensor) else str(value),
)
def test_refused(
    weight: Any, alpha: Any, options: Any, error: Error, named: str, found: str, remedy: str
) -> None:
    raises(lambda: soft_threshold(weight, alpha, **options), error, named, found, remedy)


@pytest.mark.gpu
def test_a_threshold_on_another_device_is_refused() -> None:
    on_the_gpu = torch.full((1,), 0.1, device="cuda")
    for weight, alpha in ((W, on_the_gpu), (W.cuda(), on_the_gpu.cpu())):
        with pytest.raises(ValueError, match=f"is on {alpha.device} and the weight on"):
            soft_threshold(weight, alpha)
    soft_threshold(W.cuda(), torch.tensor(0.1))  # a single number on the CPU goes with any device
