"""`SoftThreshold` on modules: everything people do to modules still works."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Error, Row, Scene, assert_refused, raises, rows
from thresholding import ALPHA, COPIERS, Copier, holder, original, put, threshold_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from torch_adapmtl import SoftThreshold, soft_threshold, soft_threshold_unstructured
from torch_adapmtl.tensor._kernels import Shrinkage, shrink_


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_parameter_identity_and_state_dict_round_trip() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    weight = first.weight
    put(first, "weight", 0.3)
    assert threshold_of(first) is not None
    assert any(p is weight for p in first.parameters())
    put(second, "weight", 0.0)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    second.load_state_dict(state)
    assert torch.equal(second.weight, first.weight)
    assert (second.weight == 0).any()
    bare = SoftThreshold(0.2, persistent=False)
    assert not bare.state_dict()
    assert list(SoftThreshold(0.2).state_dict()) == ["alpha"]


def _load(layer: nn.Module, assign: bool = False) -> None:
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["parametrizations.weight.0.alpha"].fill_(0.2)
    layer.load_state_dict(state, assign=assign)


def _swapped_load(layer: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _load(layer, assign=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _inference(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def changed(layer: nn.Module) -> None:
        with torch.inference_mode():
            change(layer)

    return changed


def _to_empty(layer: nn.Module) -> None:
    state = {k: v for k, v in layer.state_dict().items() if "alpha" not in k}
    layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=False)


# What moves alpha from 0.1 to 0.2, and what leaves it.
MOVES: dict[str, Callable[[nn.Module], object]] = {
    "set_threshold": lambda m: threshold_of(m).set_threshold(0.2),
    "fill_": lambda m: threshold_of(m).alpha.fill_(0.2),
    "another tensor": lambda m: setattr(threshold_of(m), "alpha", torch.tensor(0.2)),
    "load": _load,
    "assign": lambda m: _load(m, assign=True),
    "swapped load": _swapped_load,
    "fill_ in inference mode": _inference(lambda m: threshold_of(m).alpha.fill_(0.2)),
    "set in inference mode": _inference(lambda m: threshold_of(m).set_threshold(0.2)),
    "load in inference mode": _inference(_load),
}
KEEPS: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "to_empty": _to_empty,
    "half in inference mode": _inference(lambda m: m.half()),
    "copy in inference mode": _inference(copy.deepcopy),
}


@pytest.mark.parametrize("change", [*MOVES, *KEEPS])
@pytest.mark.parametrize("copier", [lambda m: m, *COPIERS])
@pytest.mark.parametrize("inference", [False, True])
def test_the_number_is_never_stale(change: str, copier: Copier, inference: bool) -> None:
    layer = copier(put(nn.Linear(5, 4), "weight"))
    {**MOVES, **KEEPS}[change](layer)
    for each in (layer, copier(layer)):
        alpha = threshold_of(each).alpha
        assert float(alpha) == pytest.approx(0.2 if change in MOVES else 0.1, abs=1e-3)
        with torch.inference_mode(inference), torch.no_grad():
            want = original(each).sign() * (original(each).abs() - alpha).relu()
            assert torch.equal(each.weight, want.to(each.weight.dtype))


def test_made_and_copied_in_inference_mode() -> None:
    with torch.inference_mode():
        made = put(nn.Linear(3, 3), "weight")
        assert torch.equal(copy.deepcopy(made).weight, made.weight)
        threshold_of(made).set_threshold(9.0)
        assert not made.weight.any()
    with torch.no_grad():  # autograd refuses inference tensors, those of plain modules too
        assert not made.weight.any()


def test_learned_threshold() -> None:
    alpha = nn.Parameter(torch.tensor(0.2))
    layer = nn.Linear(5, 4)
    oracle = layer.weight.detach().clone().requires_grad_()
    beta = torch.tensor(0.2, requires_grad=True)
    (oracle.sign() * (oracle.abs() - beta).relu()).square().sum().backward()
    parametrize.register_parametrization(layer, "weight", SoftThreshold(alpha))
    assert any(p is alpha for p in layer.parameters())
    layer.weight.square().sum().backward()
    torch.testing.assert_close(alpha.grad, beta.grad)
    for value in (0.2, 0.0):  # also where its number is known, and even where that is zero
        alpha.grad = None
        threshold_of(layer).set_threshold(value)
        layer.weight.sum().backward()
        weight = original(layer)
        torch.testing.assert_close(alpha.grad, -weight[weight.abs() > value].sign().sum())
    torch.optim.SGD([alpha], lr=1.0).step()
    want = soft_threshold(original(layer), alpha)
    assert torch.equal(layer.weight, want)


def test_zero_initialised_layer_trains() -> None:
    layer = put(nn.Linear(4, 3), "weight", 0.0)
    weight = original(layer)
    nn.init.zeros_(weight)
    layer(torch.ones(1, 4)).sum().backward()
    assert (weight.grad == 1).all()


@pytest.mark.parametrize("marked", [True, False])
def test_compiled_equals_eager_and_moving_does_not_recompile(marked: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    names = ["0.weight", "3.weight"]
    for name in names:
        put(net, name, marked=marked)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(2, 2, 3, 3)
    for value in (0.1, 0.0, 0.25, 0.5):
        for name in names:
            threshold_of(*[holder(net, name)[0]]).set_threshold(value)
        torch.testing.assert_close(compiled(x), net(x))
    threshold_of(net[0]).alpha.fill_(0.3)
    torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


def test_functional_call_grad_and_vmap() -> None:
    layer, x = put(nn.Linear(4, 3), "weight"), torch.randn(2, 4)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    key = "parametrizations.weight.0.alpha"
    alphas = torch.tensor([0.0, 0.05, 0.3])

    def loss(alpha: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, {**state, key: alpha}, (x,))
        return output.square().sum()

    slopes = vmap(grad(loss))(alphas)
    for alpha, slope in zip(alphas, slopes, strict=True):
        weight = soft_threshold(state["parametrizations.weight.original"], alpha)
        torch.testing.assert_close(
            loss(alpha), (x @ weight.T + state["bias"]).square().sum(), rtol=1e-5, atol=1e-6
        )
        leaf = alpha.clone().requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(loss(leaf), leaf)[0])
    assert torch.equal(threshold_of(layer).alpha, torch.tensor(ALPHA))


def test_other_parametrizations_on_the_tensor_stay() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(4, 3)).eval()
    parameter = original(layer)
    dense = layer.weight.detach()
    put(layer, "weight")
    assert torch.equal(layer.weight == 0, parameter.abs() <= ALPHA)
    sparse = layer.weight.detach()
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight, sparse)
    assert not torch.equal(layer.weight, dense)
    assert original(layer) is parameter
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer) is nn.Linear


def test_tensors_made_from_several_are_refused() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    keys, weight = list(layer.state_dict()), layer.weight
    with pytest.raises(ValueError, match=r"'weight'.* made from several tensors by _WeightNorm"):
        soft_threshold_unstructured(layer, "weight", 0.1)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer.weight, weight)
    assert not prune.is_pruned(layer)
    put(layer, "bias")  # another tensor of the module is fine
    prune.remove(layer, "bias")
    assert torch.equal(layer.weight, weight)


def test_torchs_own_removal_bakes() -> None:
    layer = put(nn.Linear(4, 3), "weight")
    weight, parameter = layer.weight.detach(), original(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight is parameter
    assert torch.equal(layer.weight, weight)
    assert type(layer) is nn.Linear
    prune.remove(layer, "weight")  # the mark goes too
    assert not prune.is_pruned(layer)
    assert torch.equal(layer.weight, weight)
    parametrize.remove_parametrizations(put(layer, "weight"), "weight")
    put(layer, "weight")  # and in its place a new one may come
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_assigning_the_weight_is_an_error(alpha: float) -> None:
    layer = put(nn.Linear(4, 3), "weight", alpha)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="SoftThreshold does not implement right_inverse"):
        layer.weight = torch.ones(3, 4)
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        layer.weight = nn.Parameter(torch.ones(3, 4))
    assert torch.equal(layer.weight, before)


def test_bad_set_threshold_changes_nothing() -> None:
    parametrization = SoftThreshold(torch.tensor(0.25))  # a tensor that is no parameter: a number
    assert list(parametrization.state_dict()) == ["alpha"]
    with pytest.raises(ValueError, match="threshold must be a finite number >= 0, got inf"):
        parametrization.set_threshold(float("inf"))
    assert parametrization(torch.ones(1)).item() == 0.75


# --- what is refused ----------------------------------------------------------------------------


def learned(value: Any) -> nn.Parameter:
    value = torch.as_tensor(value)
    return nn.Parameter(value, requires_grad=value.is_floating_point())


@pytest.mark.parametrize(
    ("threshold", "mask", "error", "named", "found", "remedy"),
    [
        (-0.1, None, ValueError, "threshold", "got -0.1", ">= 0"),
        (math.nan, None, ValueError, "threshold", "got nan", "a finite number"),
        (learned(-1.0), None, ValueError, "threshold", "got -1.0", ">= 0"),
        (learned([1.0, 1.0]), None, ValueError, "threshold", "shape (2,)", "one SoftThreshold a"),
        (learned(1), None, TypeError, "threshold", "torch.int64", "cast it"),
        (0.1, torch.ones(3), TypeError, "mask", "torch.float32", "weight != 0"),
        (0.1, [True], TypeError, "mask", "a list", "weight != 0"),
    ],
    ids=lambda value: None if isinstance(value, Tensor) else str(value),
)
def test_refused(
    threshold: Any, mask: Any, error: Error, named: str, found: str, remedy: str
) -> None:
    raises(lambda: SoftThreshold(threshold, mask=mask), error, named, found, remedy)


def unfit(**options: Any) -> Callable[[], nn.Module]:
    """A layer whose threshold or mask does not fit it."""

    def made() -> nn.Module:
        layer = nn.Linear(4, 3)
        threshold = SoftThreshold(options.get("threshold", 0.1), mask=options.get("mask"))
        parametrize.register_parametrization(layer, "weight", threshold, unsafe=True)
        return layer

    return made


def moved() -> nn.Module:
    layer: Any = put(nn.Linear(4, 3), "weight")
    layer.parametrizations.weight[0].to("meta")
    return layer


def forward(scene: Scene) -> object:
    return scene.model(torch.ones(1, 4))


@rows(
    [
        Row(id, forward, ValueError, named, found, remedy, model=model, goes_on=False)
        for id, model, named, found, remedy in (
            ("a mask of another shape", unfit(mask=torch.ones(4, 3).bool()), "mask",
             "shape (4, 3)", "the weight's shape (3, 4)"),
            ("a mask that broadcasts", unfit(mask=torch.ones(4).bool()), "mask", "shape (4,)",
             "the weight's shape (3, 4)"),
            ("a mask on another device", unfit(mask=torch.ones(3, 4, device="meta").bool()),
             "mask", "on meta", "move it with the module"),
            ("a threshold on another device", moved, "alpha", "is on meta",
             "move the whole model"),
            ("a learned one on another device",
             unfit(threshold=learned(torch.ones((), device="meta"))), "alpha", "is on meta",
             ".to('cpu')"),
        )
    ]
)  # fmt: skip
def test_refused_by_the_forward_pass(row: Row) -> None:
    assert_refused(row)


@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    alpha=st.floats(0.125, 5, width=32),
    scale=st.floats(1, 20, width=32),
)
def test_the_parametrization_with_a_scale_is_what_parameters_hold(
    values: list[float], alpha: float, scale: float
) -> None:
    """Where thresholds are trained, and where they are not; the gradient passes in both."""
    weight = torch.tensor(values, requires_grad=True)
    threshold = SoftThreshold(alpha, straight_through=True)
    threshold.set_scale(scale)
    sparse = threshold(weight)
    held, residual = weight.detach().clone(), torch.zeros_like(weight)
    shrink_([Shrinkage(held, residual, threshold.known(), math.inf, None, scale)])
    torch.testing.assert_close(sparse, held)
    (gradient,) = torch.autograd.grad(sparse.sum(), weight)
    assert (gradient == 1).all()
    held, threshold._known = threshold(weight), None  # as in a compiled graph
    assert torch.equal(threshold(weight) != 0, held != 0)
    threshold.set_threshold(0.0)
    threshold._known = None
    assert torch.equal(threshold(weight), weight)


@pytest.mark.parametrize("scale", [0.5, math.inf, math.nan])
def test_a_scale_that_is_refused(scale: float) -> None:
    threshold = SoftThreshold(0.5)
    with pytest.raises(ValueError, match=rf"scale must be at least 1.*got scale={scale}"):
        threshold.set_scale(scale)
    assert threshold.scale == 1.0
    with pytest.raises(ValueError, match=r"needs reach=math.inf; got scale=2.0 with reach=1.5"):
        SoftThreshold(0.5, reach=1.5).set_scale(2.0)
