"""Groups by hand, and the selectors of tensors in `groups=` and `exclude=`."""

from __future__ import annotations

from typing import Any

import awkward
import pytest
import torch
from awkward import Net
from finding import X, by_name, detected
from torch import Tensor, nn

from torch_adapmtl import find_components
from torch_adapmtl.components.find import SHARED


class Never(Net):
    def forward(self, x: Tensor) -> Any:
        raise AssertionError("the model must not be run")


def test_groups_for_everything_need_no_run() -> None:
    model = Never()
    components = find_components(
        model,
        groups={"shared": ["body"], "b": model.heads["b"], "a": [model.heads["a"].weight]},
    )
    assert components.tasks == ("b", "a")
    assert by_name(components) == detected(Net())
    assert find_components(Never(), groups={"main": ["*"]}).names == ("main",)
    declared = find_components(
        Never(), groups={"shared": "*"}, task_outputs={"a": lambda o: o, "b": lambda o: o}
    )
    assert (declared.tasks, declared.names) == (("a", "b"), ("shared",))


def test_groups_override_a_part() -> None:
    components = find_components(
        awkward.UnusedParts(), X, groups={"stem": ["body.0.*"], "b+a": "heads.?", "a": "dropped"}
    )
    assert by_name(components) == {
        "body.0.weight": "stem",
        "body.2.weight": "shared",
        "heads.a.weight": "shared",
        "heads.b.weight": "shared",
        "spare.weight": "unused",
        "dropped.weight": "a",
    }
    assert components.names == ("shared", "a", "stem")


def test_groups_put_partly_shared_names_in_declared_order() -> None:
    components = find_components(awkward.Branching(), X, groups={"b+a": ["trunk"], "x": ["a"]})
    assert components["a+b"][0].name == "trunk.weight"
    assert components.names == ("c", "b", "c+b", "a+b", "x")


def test_groups_can_prune_what_is_frozen_or_unused() -> None:
    assert detected(awkward.FrozenBody(), groups={"shared": ["body"]}) == detected(Net())
    assert detected(awkward.UnusedParts(), groups={"b": ["spare"]})["spare.weight"] == "b"


def test_selectors_find_aliases_wrapped_and_pruned_tensors() -> None:
    assert detected(awkward.Aliased(), groups={"stem": ["alias"]})["heads.a.weight"] == "stem"
    pruned = awkward.Pruned()
    for selector in ("body.0.weight", "body.0.weight_orig", "body.0", pruned.body[0].weight_orig):
        assert detected(pruned, groups={"stem": [selector]})["body.0.weight"] == "stem"
    model = Net()
    model.body = torch.compile(model.body)
    found = detected(model, groups={"stem": ["body.0", model.body._orig_mod[2]]})
    assert list(found.values()) == ["stem", "stem", "a", "b"]
    everything = find_components(torch.compile(model), groups={"main": [torch.compile(model)]})
    assert everything.names == ("main",)


def test_tied_weights_in_two_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"'heads.a.weight' \(tied to 'heads.b.weight'"):
        find_components(awkward.Tied(), X, groups={"a": ["heads.a"], "b": ["heads.b"]})


def test_exclude_leaves_tensors_out() -> None:
    model = Net()
    assert detected(model, exclude="body.*") == {"heads.a.weight": "a", "heads.b.weight": "b"}
    selectors = [model.body[2], model.heads["a"].weight, "heads.b.bias"]
    assert detected(model, exclude=selectors) == {"body.0.weight": SHARED, "heads.b.weight": "b"}
    tied = awkward.Tied()
    assert "heads.a.weight" not in detected(tied, exclude=["embedding"])


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random:UserWarning")  # torch 2.6, on a CPU
def test_sharded_models_are_refused() -> None:
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = Net()
    weight = tensors.distribute_tensor(model.body[0].weight, mesh, [tensors.Shard(0)])
    model.body[0].weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"body\.0\.weight is sharded .* before sharding"):
        find_components(model, X)
