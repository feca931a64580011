"""The soft threshold as a method of `torch.nn.utils.prune`, and beside the other methods."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Row, Scene, assert_refused, raises, rows
from thresholding import COPIERS, Copier, original, put, threshold_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

from torch_adapmtl import (
    SoftThreshold,
    SoftThresholdPruning,
    soft_threshold,
    soft_threshold_unstructured,
)

LATER: dict[str, Callable[[nn.Module], object]] = {
    "identity": lambda m: prune.identity(m, "weight"),
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "random_structured": lambda m: prune.random_structured(m, "weight", 0.5, dim=0),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(4, 6)),
    "global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5
    ),
}
later = pytest.mark.parametrize("method", LATER)


def linear() -> nn.Linear:
    return nn.Linear(6, 4)


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """All of a module that a failed call might have changed."""
    return (
        {k: v.clone() for k, v in module.state_dict(keep_vars=True).items()},
        [id(p) for p in module.parameters()],
        [type(h) for h in module._forward_pre_hooks.values()],
        sorted(set(vars(module)) | set(dir(module))),
        type(module),
    )


def assert_untouched(module: nn.Module, before: tuple[Any, ...]) -> None:
    now = state_of(module)
    assert now[1:] == before[1:]
    assert list(now[0]) == list(before[0])
    assert all(torch.equal(now[0][key], before[0][key]) for key in now[0])


def test_marks_and_bakes() -> None:
    layer = linear()
    weight, dense = layer.weight, layer.weight.detach().clone()
    assert not prune.is_pruned(layer)
    assert soft_threshold_unstructured(layer, "weight", 0.2) is layer
    assert prune.is_pruned(nn.Sequential(layer))
    x = torch.randn(3, 6)
    before = layer(x)
    assert prune.remove(layer, "weight") is layer
    assert not prune.is_pruned(layer)
    assert layer.weight is weight
    assert torch.equal(layer.weight, soft_threshold(dense, 0.2))
    assert torch.equal(layer(x), before)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert pickle.dumps(layer)
    with pytest.raises(ValueError, match="has to be pruned before"):
        prune.remove(layer, "weight")


@given(
    seed=st.integers(0, 2**31),
    threshold=st.floats(0, 0.5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_baked_weight_is_the_soft_threshold(
    seed: int, threshold: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(5, 4).to(dtype)
    method = SoftThresholdPruning(threshold)
    want = soft_threshold(layer.weight.detach(), threshold)
    assert torch.equal(method.prune(layer.weight.detach()), want)
    returned = SoftThresholdPruning.apply(layer, "weight", threshold)
    assert isinstance(returned, prune.BasePruningMethod)
    assert torch.equal(returned.apply_mask(layer), want)
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight, want)


def test_global_unstructured_makes_plain_masks() -> None:
    net = nn.Sequential(linear(), nn.Linear(4, 3))
    weights = [net[0].weight.detach().clone(), net[1].weight.detach().clone()]
    tensors = [(net[0], "weight"), (net[1], "weight")]
    prune.global_unstructured(tensors, SoftThresholdPruning, threshold=0.2)
    prune.global_unstructured(tensors, SoftThresholdPruning, threshold=0.1)  # changes nothing
    for layer, weight in zip(net, weights, strict=True):
        assert torch.equal(layer.weight_mask, (weight.abs() > 0.2).float())
        assert torch.equal(layer.weight, weight * (weight.abs() > 0.2))
        prune.remove(layer, "weight")
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("importance", [None, "scores"])
def test_prune_method_takes_scores_and_masks(importance: str | None) -> None:
    tensor, mask = torch.tensor([-2.0, 0.5, 3.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    scores = torch.tensor([0.0, 9.0, 9.0, 9.0]) if importance else None
    pruned = SoftThresholdPruning(1.0).prune(tensor, mask, scores)
    assert pruned.tolist() == ([0.0, 0.0, 2.0, 0.0] if importance else [-1.0, 0.0, 2.0, 0.0])


@later
@pytest.mark.parametrize("copier", [None, *COPIERS], ids=["itself", *"dps"])
@pytest.mark.parametrize("after_forward", [False, True])
def test_later_prune_calls_are_refused(
    method: str, copier: Copier | None, after_forward: bool
) -> None:
    layer = put(linear(), "weight")
    source = layer
    if copier is not None:
        layer = copier(layer)
    x = torch.randn(2, 6)
    if after_forward:
        layer(x)
    before, output = state_of(layer), source(x)
    for _ in range(2):  # the first refusal must not open the door to a second call
        with pytest.raises(RuntimeError, match=r"'weight'.*soft threshold.*finalize\(\).*remove"):
            LATER[method](layer)
        assert len(layer._forward_pre_hooks) == 1
        assert_untouched(layer, before)
    assert torch.equal(layer(x), output)
    prune.remove(layer, "weight")
    weight = layer.weight.detach().clone()
    LATER[method](layer)  # and now it works
    assert torch.equal(layer.weight, weight * layer.weight_mask)
    assert prune.is_pruned(source)


@pytest.mark.parametrize("lost", ["source", "replica"])
def test_a_copy_is_guarded_whatever_else_ran_or_went(lost: str) -> None:
    source = put(linear(), "weight")
    layer = copy.deepcopy(source) if lost == "source" else source
    replica = copy.copy(source)  # data parallel replicas share the hooks, too
    replica(torch.randn(2, 6))
    del replica, source
    with pytest.raises(RuntimeError, match="cannot apply L1Unstructured"):
        prune.l1_unstructured(layer, "weight", 0.5)
    assert prune.is_pruned(layer)


def test_other_tensors_of_the_module_are_free() -> None:
    layer = put(linear(), "weight")
    weight = layer.weight.detach()
    prune.l1_unstructured(layer, "bias", 0.5)
    assert (layer.bias == 0).sum() == 2
    for name in ("bias", "weight"):
        prune.remove(layer, name)
    assert torch.equal(layer.weight, weight)
    assert (layer.bias == 0).sum() == 2
    assert type(layer) is nn.Linear


def test_order_of_removal_beside_other_hooks() -> None:
    layer = linear()
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("user's"))
    put(put(layer, "weight"), "bias")
    layer(torch.randn(2, 6))
    prune.remove(layer, "weight")
    assert parametrize.is_parametrized(layer, "bias")
    prune.remove(layer, "bias")
    layer(torch.randn(2, 6))
    assert calls == ["user's", "user's"]
    assert list(layer._parameters) == ["weight", "bias"]


def test_iterative_pruning() -> None:
    layer, zeros = linear(), []
    for threshold in (0.05, 0.05, 0.05):  # each round shrinks what the last one left
        prune.remove(put(layer, "weight", threshold), "weight")
        zeros.append(int((layer.weight == 0).sum()))
        prune.l1_unstructured(layer, "weight", 0.25)
        prune.remove(layer, "weight")
    assert zeros == sorted(zeros)
    assert zeros[-1] > zeros[0] > 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_tensors_that_an_old_style_hook_makes() -> None:
    layer = weight_norm(linear())
    with pytest.raises(ValueError, match=r"no parameter 'weight', only .*'weight_g', 'weight_v'"):
        soft_threshold_unstructured(layer, "weight", 0.1)
    assert not prune.is_pruned(layer)


def test_one_engine() -> None:
    layer = put(linear().half(), "weight", 0.1)
    assert isinstance(threshold_of(layer), SoftThreshold)
    assert threshold_of(layer).alpha.dtype == torch.float16
    assert layer.weight.dtype == torch.float16


# --- masks that were there before ---------------------------------------------------------------

EARLIER: dict[str, Callable[[nn.Module, str], object]] = {
    "custom_from_mask": lambda m, n: prune.custom_from_mask(
        m, n, (torch.arange(getattr(m, n).numel()) % 3 > 0).view_as(getattr(m, n))
    ),
    "l1": lambda m, n: prune.l1_unstructured(m, n, 0.4),
    "structured": lambda m, n: prune.ln_structured(m, n, 0.5, n=1, dim=1),
    "container": lambda m, n: (
        prune.random_unstructured(m, n, 0.3),
        prune.ln_structured(m, n, 0.3, n=2, dim=0),
    ),
    "ours, globally": lambda m, n: prune.global_unstructured(
        [(m, n)], SoftThresholdPruning, threshold=0.2
    ),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (linear, "weight", (3, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "weight", (1, 2, 3, 3, 3)),
    "lstm": (lambda: nn.LSTM(4, 3), "weight_hh_l0", (5, 2, 4)),
}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("copier", [lambda m: m, *COPIERS])
def test_an_earlier_mask_survives(
    earlier: str, kind: str, straight_through: bool, copier: Copier
) -> None:
    make, name, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    EARLIER[earlier](layer, name)
    layer(x)
    masked = getattr(layer, name + "_mask") == 0
    parameter = getattr(layer, name + "_orig")
    want = soft_threshold(getattr(layer, name).detach(), 0.05)
    put(layer, name, 0.05)
    assert original(layer, name) is parameter
    assert torch.equal(getattr(layer, name), want)
    assert len(layer._forward_pre_hooks) == 1
    layer = copier(layer)
    threshold_of(layer, name).straight_through = straight_through
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.1)
    start = original(layer, name).detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        first(layer(x)).square().sum().backward()
        assert not original(layer, name).grad[masked].any()
        optimiser.step()
        assert not getattr(layer, name)[masked].any()
    assert not torch.equal(getattr(layer, name)[~masked], start[~masked])
    before = first(layer(x))
    prune.remove(layer, name)
    assert torch.equal(first(layer(x)), before)
    assert not layer.get_parameter(name)[masked].any()
    assert sorted(layer.state_dict()) == sorted(make().state_dict())


def test_masked_state_dict_round_trip() -> None:
    first_layer, second = linear(), linear()
    for seed, layer in enumerate((first_layer, second)):
        torch.manual_seed(seed)
        prune.random_unstructured(layer, "weight", 0.5)
        put(layer, "weight", 0.1)
    assert not torch.equal(threshold_of(first_layer).mask, threshold_of(second).mask)
    second.load_state_dict(first_layer.state_dict())
    assert torch.equal(second.weight, first_layer.weight)


# --- what is refused ----------------------------------------------------------------------------


def attach(name: Any = "weight", threshold: Any = 0.1) -> Callable[[Scene], object]:
    return lambda scene: soft_threshold_unstructured(scene.model, name, threshold)


def layer_of(make: Callable[[Tensor], Any], grad: bool = True) -> Callable[[], nn.Module]:
    """A layer with another kind of tensor as its weight."""

    def made() -> nn.Module:
        layer = linear()
        layer.weight = nn.Parameter(make(layer.weight.detach()), grad)
        return layer

    return made


def inference_layer() -> nn.Module:
    with torch.inference_mode():
        return linear()


V, T, R = ValueError, TypeError, RuntimeError
CAST = "cast it first, or leave it out"
TABLE = [
    Row(id, do, error, named, found, remedy, model=model, goes_on=False)
    for id, model, do, error, named, found, remedy in (
        ("no module", linear, lambda _: soft_threshold_unstructured("x", "weight", 0.1), T,  # type: ignore[type-var]
         "module", "'x'", "a torch.nn.Module"),
        ("a wrong name", linear, attach("wieght"), V, "name", "Linear has no parameter 'wieght'",
         "only ['weight', 'bias']"),
        ("a name that is none", linear, attach(3), V, "name", "no parameter 3",
         "['weight', 'bias']"),
        ("no bias", lambda: nn.Linear(2, 2, bias=False), attach("bias"), V, "name",
         "no parameter 'bias'", "only ['weight']"),
        ("a buffer", lambda: nn.BatchNorm1d(2), attach("running_mean"), V, "name",
         "no parameter 'running_mean'", "only ['weight', 'bias']"),
        ("a path", lambda: nn.Sequential(linear()), attach("0.weight"), V, "name",
         "no parameter '0.weight'", "only []"),
        ("an attribute", linear, attach("in_features"), V, "name", "no parameter 'in_features'",
         "only ['weight', 'bias']"),
        ("below 0", linear, attach(threshold=-0.1), V, "threshold", "got -0.1", ">= 0"),
        ("in words", linear, attach(threshold="x"), T, "threshold", "'x'", "a number"),
        ("integers", layer_of(lambda w: w.char(), grad=False), attach(), T, "'weight'",
         "torch.int8", CAST),
        ("complex", layer_of(lambda w: w.cfloat()), attach(), T, "'weight'", "torch.complex64",
         CAST),
        ("sparse", layer_of(lambda w: w.to_sparse()), attach(), T, "'weight'", "torch.sparse_coo",
         "(.to_dense())"),
        ("lazy", lambda: nn.LazyLinear(3), attach(), V, "'weight'", "not initialised yet",
         "run one batch"),
        ("inference mode", inference_layer, attach(), T, "'weight'", "an inference tensor",
         "copy.deepcopy"),
        ("twice", lambda: put(linear(), "weight"), attach(), R, "'weight' of",
         "already has a soft threshold", "prune.remove"),
        ("twice, bare", lambda: put(linear(), "weight", marked=False), attach(), R, "'weight' of",
         "already has a soft threshold", "prune.remove"),
    )
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@rows(TABLE)
def test_refused(row: Row) -> None:
    assert_refused(row)


def test_a_method_with_a_threshold_below_zero_is_refused() -> None:
    raises(lambda: SoftThresholdPruning(-0.1), ValueError, "threshold", "got -0.1", ">= 0")
