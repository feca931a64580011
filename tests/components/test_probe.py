"""The state of torch during the run of a model, and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import awkward
import pytest
import torch
import torch.utils.checkpoint
from awkward import Net
from finding import X, detected
from torch import Tensor

from torch_adapmtl import find_components


def test_a_batch_of_one_passes_batch_norm_in_train_mode() -> None:
    assert detected(awkward.Auxiliary(), X[:1])["heads.aux.weight"] == "aux"


def test_reentrant_checkpointing_of_what_has_no_grad_before_it() -> None:
    class First(Net):
        def features(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=True)

    assert detected(First()) == detected(Net())


def test_a_compiled_model_is_not_compiled_by_the_probe() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = Net()
    model.body = torch.compile(model.body, backend=backend, fullgraph=True)
    find_components(model, X)
    assert compiled == []
    model(X)
    assert len(compiled) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "state",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_state_does_not_matter(state: Callable[[], Any]) -> None:
    model, expected = Net(), detected(Net())
    with state():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x = X.clone()  # made in inference mode, perhaps
        cached = model(x) if torch.is_autocast_enabled("cpu") else None
        assert detected(model, x) == expected
        assert torch.is_grad_enabled() == grad
        assert torch.is_inference_mode_enabled() == inference
        if cached is not None:
            assert torch.is_autocast_cache_enabled()
            assert torch.equal(model(x)["a"], cached["a"])


def test_autocast_hides_no_weight_that_ran_without_grad_first() -> None:
    class Twice(Net):
        def features(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.body(x)
            return self.body(x) - target

    with torch.autocast("cpu", torch.bfloat16):
        assert detected(Twice()) == detected(Net())


def test_autocast_keeps_no_copy_of_a_weight_from_the_probe() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        find_components(model, X)
        with torch.no_grad():
            for parameter in model.heads["a"].parameters():
                parameter.zero_()
        assert not model(X)["a"].any()


def test_torch_is_put_back() -> None:
    find_components(awkward.NoGradBody(), X)  # looks a second time, through no_grad
    with torch.inference_mode():
        assert X.clone().is_inference()
    with torch.no_grad():
        assert not (X * Net().body[0].weight.sum()).requires_grad
    assert not (X * Net().body[0].weight.sum()).detach().requires_grad
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x * 2

    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True).sum().backward()
    assert seen == [False, True]
    assert x.grad is not None
