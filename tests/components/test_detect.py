"""Runs of the model: in which mode, how often, and what is said if they fail."""

from __future__ import annotations

from typing import Any

import awkward
import pytest
import torch
from awkward import Net, linear
from finding import X, detected
from torch import Tensor, nn
from untouched import assert_untouched

from torch_adapmtl import find_components
from torch_adapmtl.components.find import SHARED, UNUSED


def test_auxiliary_heads_are_found_in_eval_mode_too() -> None:
    model = awkward.Auxiliary().eval()
    assert find_components(model, X).tasks == ("a", "b", "aux")
    assert not any(module.training for module in model.modules())


class Dropping(Net):
    """Leaves its inner layer out at random while it trains, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(awkward.WIDTH, awkward.WIDTH)

    def features(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if self.training and torch.rand(()) < 0.99 else self.inner(x)


def test_a_layer_that_training_drops_at_random_is_found() -> None:
    torch.manual_seed(0)
    model = Dropping()
    components = {t.name: t.component for t in find_components(model, X).tensors}
    assert components["inner.weight"] == SHARED


def test_other_outputs_in_eval_mode_tell_nothing() -> None:
    """By index, a task is an entry of a tuple in training, and a sample of a tensor otherwise."""

    class TwoMinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
            self.blend = nn.Linear(4, 2)  # in evaluation only

        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            return (self.a(h), self.b(h)) if self.training else self.blend(h)

    found = find_components(TwoMinds(), torch.ones(2, 4), task_outputs={"first": 0, "second": 1})
    assert [tensor.name for tensor in found["unused"]] == ["blend.weight"]


def test_the_second_look_may_fail() -> None:
    class Teacher(Net):
        """Writes to a parameter under no_grad, which fails when that is ignored."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = linear()

        def features(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.body[0].bias.mul_(0.5)
            return self.body(x)

    model = Teacher()
    bias = model.body[0].bias.detach().clone()
    assert detected(model)["spare.weight"] == UNUSED
    assert torch.equal(model.body[0].bias, bias)


class Fails(Net):
    def features(self, x: Tensor) -> Tensor:
        self.calls = 1
        self.heads["a"].weight.data += 1
        torch.rand(1)
        self.body(x)
        raise LookupError("no such thing\nin this model")


def test_a_failing_model_is_named_and_untouched() -> None:
    model = Fails()

    def run() -> None:
        with pytest.raises(
            RuntimeError, match=r"failed on example_inputs \(LookupError: no such thing\)"
        ) as caught:
            find_components(model, X)
        assert isinstance(caught.value.__cause__, LookupError)

    assert_untouched(model, run)


def test_a_failing_call_of_a_task_is_named() -> None:
    with pytest.raises(TypeError, match=r"task_inputs\['b'\] must be a tensor, .* found list"):
        find_components(Net(), task_inputs={"a": X, "b": [X]})
    with pytest.raises(RuntimeError, match=r"failed on task_inputs\['b'\] \(RuntimeError"):
        find_components(Net(), task_inputs={"a": X, "b": X[:, :2]})
