"""Components of awkward models, and what is known of each tensor."""

from __future__ import annotations

import awkward
import pytest
import torch
from awkward import Case, Net
from finding import X, by_name, detected, each_case
from html_tables import tables_of

from torch_adapmtl import find_components
from torch_adapmtl.components.find import UNUSED


@each_case
def test_zoo(case: Case) -> None:
    components = find_components(case.build(), case.inputs(), **case.options)
    assert by_name(components) == case.expected
    assert components.tasks == case.tasks


@each_case
def test_tensors_are_the_models_parameters_in_order_and_once(case: Case) -> None:
    model = case.build()
    tensors = find_components(model, case.inputs(), **case.options).tensors
    order = [id(parameter) for parameter in model.parameters()]
    assert [id(t.parameter) for t in tensors] == sorted(
        {id(t.parameter) for t in tensors}, key=order.index
    )
    for tensor in tensors:
        assert tensor.owners
        for module, name in tensor.owners:
            assert hasattr(module, name)
            assert getattr(module, name).shape == tensor.parameter.shape


def test_tied_weights_have_all_their_owners() -> None:
    model = awkward.Tied()
    tied = find_components(model, X)["a+b"]
    assert [(tensor.name, tensor.parameter) for tensor in tied] == [
        ("heads.a.weight", model.embedding.weight)
    ]
    assert tied[0].owners == (
        (model.heads["a"], "weight"),
        (model.heads["b"], "weight"),
        (model.embedding, "weight"),
    )


def test_an_aliased_module_is_one_owner() -> None:
    model = awkward.Aliased()
    (head,) = find_components(model, X)["a"]
    assert head.owners == ((model.heads["a"], "weight"),)


def test_pruned_and_parametrized_tensors_count_as_weight() -> None:
    pruned, parametrized = awkward.Pruned(), awkward.Parametrized()
    first = find_components(pruned, X).tensors[0]
    assert first.name == "body.0.weight"
    assert first.parameter is pruned.body[0].weight_orig
    assert first.owners == ((pruned.body[0], "weight"),)
    first = find_components(parametrized, X).tensors[0]
    assert first.name == "body.0.weight"
    assert first.parameter is parametrized.body[0].parametrizations.weight.original
    assert first.owners == ((parametrized.body[0], "weight"),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert detected(Net().to(dtype), X.to(dtype)) == detected(Net())


def test_cuda_model_on_its_device(device: torch.device) -> None:
    assert detected(Net().to(device), X.to(device)) == detected(Net())


def test_components_as_a_container() -> None:
    components = find_components(awkward.Branching(), X, exclude="a")
    assert components.names == ("shared", "c", "b", "c+b")
    assert "c+b" in components
    assert "a" not in components
    assert components["a"] == components[UNUSED] == ()
    assert [tensor.name for tensor in components["c+b"]] == ["branch.weight"]
    with pytest.raises(KeyError, match="no component 'd'; there are shared"):
        components["d"]


def test_the_table() -> None:
    table = str(find_components(awkward.UnusedParts(), X)).splitlines()
    assert [line.split() for line in table] == [
        ["component", "tensors", "weights", "share"],
        ["shared", "2", "72", "70.6", "%"],
        ["a", "1", "12", "11.8", "%"],
        ["b", "1", "18", "17.6", "%"],
        ["unused", "2", "72", "dense"],
    ]
    assert len({len(line) for line in table[1:-1]}) == 1


def test_the_table_as_html() -> None:
    components, tensors = tables_of(find_components(awkward.UnusedParts(), X))
    assert components[1] == ["shared", "2", "72", "70.6 %"]
    assert components[-1] == ["unused", "2", "72", "dense"]
    assert tensors[0] == ["tensor", "component", "shape", "weights"]
    assert tensors[3] == ["heads.a.weight", "a", "2 x 6", "12"]
    assert len(tensors) == 7
