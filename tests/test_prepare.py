"""The one call: what it refuses, and that where it is made does not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import STEPS, Error, Row, Scene, assert_refused, call, option, rows, running
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import TwoTasks, prepare, tensors, train, weights, zeros

from torch_adapmtl import (
    Magnitude,
    Paper,
    SparsitySchedule,
    apply_adapmtl,
    find_components,
    soft_threshold_unstructured,
)
from torch_adapmtl.weighting._make import make_weighting

V, T, R = ValueError, TypeError, RuntimeError
NAN, INF = float("nan"), float("inf")

ARGUMENTS = [
    *(
        option(
            f"target {value!r}", V, "target_sparsity", f"got {value!r}", "90 % is 0.9",
            target_sparsity=value,
        )
        for value in (1.0, 90, -0.1, NAN, INF, "0.9", None, True, 0.9j)
    ),
    *(
        option(
            f"steps {value!r}", V, "total_steps", f"got {value!r}", "number of optimizer steps",
            total_steps=value,
        )
        for value in (0, -3, 10.0, NAN, INF, True, "10", None, 10**20)
    ),
    option("a method's name", V, "method", "'fast'", "one of 'adaptive', 'paper', or a Method",
           method="fast"),
    option("no method", V, "method", "None", "or a Method", method=None),
    option("a method's class", T, "method", "the class Paper", "pass Paper(...)", method=Paper),
    option("a schedule for a method", V, "method", "SparsitySchedule(", "or a Method",
           method=SparsitySchedule()),
    *(
        Row(f"{name} beside the method", lambda scene, o={name: value}: apply_adapmtl(
                scene.model, target_sparsity=0.5, total_steps=STEPS, **o),
            T, name, "unexpected keyword argument", "apply_adapmtl()")
        for name, value in (("schedule", SparsitySchedule()), ("mode", "paper"), ("reach", 2.0))
    ),
]  # fmt: skip


def with_attribute() -> nn.Module:
    model: Any = TwoTasks()
    model.adapmtl = 3
    return model


def with_threshold() -> nn.Module:
    model = TwoTasks()
    soft_threshold_unstructured(model.body, "weight", 0.1)
    return model


def with_tied_masks() -> nn.Module:
    """A tied weight that is masked in one of its two places."""
    model: Any = TwoTasks()
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    prune.custom_from_mask(model.twin, "weight", (torch.rand(12, 6) > 0.5).float())
    return model


def compiled(scene: Scene) -> None:
    scene.wrapped = torch.compile(scene.model, backend="eager")


def unfit(
    id: str, model: Callable[[], Any], error: Error, named: str, found: str, remedy: str,
    **options: Any,
) -> Row:  # fmt: skip
    return Row(id, call(**options), error, named, found, remedy, model=model, goes_on=False)


GROUPS = {"a": ["heads.a"], "b": ["heads.b"], "shared": ["body"]}
MODELS = [
    unfit("an attribute in the way", with_attribute, V, "'adapmtl'", "has an attribute",
          "rename it"),
    unfit("a threshold already", with_threshold, V, "'body.weight'", "has a soft threshold already",
          "prune.remove"),
    unfit("a tie masked in one place", with_tied_masks, V, "'body.weight' is tied",
          "the 2 modules", "same mask", groups=GROUPS),
    running("applying twice", call(), R, "apply_adapmtl", "on this model before",
            "or undo() to remove it"),
    running("applying twice, compiled", lambda s: prepare(s.wrapped), R, "apply_adapmtl",
            "on this model before", "call finalize()", first=compiled),
    running("applying to a part", lambda s: apply_adapmtl(
                s.model.body, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}),
            V, "'weight'", "belongs to a model that is being pruned", "finalize() or undo()"),
    running("applying to a part, with trained thresholds", lambda s: apply_adapmtl(
                s.model.body, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}),
            V, "'weight'", "has a soft threshold already", "call finalize() on the pruner",
            options={"allocation": "gradient"}),
]  # fmt: skip


@rows([*ARGUMENTS, *MODELS])
def test_refused(row: Row) -> None:
    assert_refused(row)


ANYTHING = st.one_of(st.none(), st.booleans(), st.text(), st.complex_numbers(), st.just([0.5]))
NUMBERS = st.one_of(st.floats(), st.integers(-(2**70), 2**70))


@given(NUMBERS | ANYTHING)
def test_a_target_is_taken_or_refused(value: Any) -> None:
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1:
        assert prepare(TwoTasks(), target_sparsity=value).target_sparsity == value
    else:
        do = call(target_sparsity=value)
        assert_refused(Row("", do, V, "target_sparsity", repr(value), "90 % is 0.9", goes_on=False))


@given(NUMBERS | ANYTHING)
def test_a_number_of_steps_is_taken_or_refused(value: Any) -> None:
    if type(value) is int and 1 <= value <= 2**53:
        assert prepare(TwoTasks(), total_steps=value).total_steps == value
    else:
        do = call(total_steps=value)
        assert_refused(Row("", do, V, "total_steps", repr(value), "optimizer steps", goes_on=False))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    pruner = prepare(TwoTasks(), target_sparsity=kind(0.5), total_steps=np.int64(5), reach=kind(2))
    assert (pruner.target_sparsity, pruner.total_steps) == (0.5, 5)


class Registered(nn.Linear):
    """A layer whose subclasses must name themselves, so that torch can make none of it."""

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


def _half_attached() -> tuple[Any, dict[str, Tensor], dict[str, type]]:
    """A model whose last layer has refused a threshold, and its state and classes before."""
    model: Any = TwoTasks()
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    prune.random_unstructured(model.heads["a"], "weight", amount=0.5)
    model.heads["b"] = Registered(12, 3)
    before = tensors(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'key'"):
        prepare(model, method=Paper())  # which attaches parametrizations
    return model, before, classes


@pytest.mark.parametrize(
    ("method", "given", "found"),
    [
        ("adaptive", None, "equal"),
        (Magnitude(), None, "equal"),
        ("paper", None, "stability"),
        (Paper(start=-4.0), None, "stability"),
        ("paper", "equal", "equal"),
        ("adaptive", "stability", "stability"),
    ],
)
def test_the_weighting_is_that_of_the_paper_only_with_its_method(
    method: Any, given: Any, found: str
) -> None:
    model = nn.Linear(4, 2)
    pruner = apply_adapmtl(
        model, target_sparsity=0.5, total_steps=40, example_inputs=torch.ones(2, 4),
        task_outputs={"a": lambda out: out[:, 0], "b": lambda out: out[:, 1]},
        method=method, weighting=given,
    )  # fmt: skip
    expected = make_weighting(found, pruner.tasks, 40)
    assert type(pruner.weighting) is type(expected)
    assert pruner.weighting.config() == expected.config()


def test_a_failure_while_attaching_is_undone() -> None:
    model, before, classes = _half_attached()
    assert not hasattr(model, "adapmtl")
    assert prune.is_pruned(model.heads["a"])
    assert not prune.is_pruned(model.body)
    assert model.twin.weight is model.body.weight
    for name, module in model.named_modules():
        if name != "heads.b":
            assert type(module) is classes[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_layer_that_refuses_a_threshold_keeps_its_weight() -> None:
    model, before, _ = _half_attached()
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}, {"method": "paper"}], ids=str)
def test_where_it_is_called_does_not_matter(context: Any, options: dict[str, Any]) -> None:
    found = []
    for surroundings in (torch.enable_grad, context):
        torch.manual_seed(0)
        model = TwoTasks()
        with surroundings():
            pruner = prepare(model, total_steps=STEPS, **options)
        train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=0.1)), range(STEPS))
        found.append((tensors(model), pruner.controller.thresholds()))
    assert all(torch.equal(value, found[1][0][key]) for key, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*reduce_range.*")
def test_a_model_in_training_for_quantisation() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = TwoTasks().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    before = tensors(model)  # among them buffers that the first run makes longer
    find_components(model, torch.ones(2, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pruner = prepare(model, total_steps=STEPS)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(STEPS))
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_inputs_on_another_device() -> None:
    model = TwoTasks().cuda()
    assert_refused(
        Row("", call(), R, "example_inputs", "cuda", "on the model's device",
            model=lambda: model, goes_on=False)
    )  # fmt: skip
