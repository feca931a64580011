"""Gradients as they come: whose, when, and on which parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toys import TwoTasks, losses, prepare, train

from torch_adapmtl import SparsitySchedule, Taylor
from torch_adapmtl.layers.gradient_hooks import GradientHooks

EARLY = SparsitySchedule(start=0.0, end=0.1)


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_calls_while_it_listens_and_for_trained_layers_only() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    seen: list[int] = []

    def see(index: int, weight: nn.Parameter) -> None:
        assert weight is pruner.layers[index].weight
        assert weight.grad is not None
        seen.append(index)

    def backward() -> list[int]:
        seen.clear()
        sum(loss for loss in losses(model, 0).values()).backward()  # type: ignore[union-attr]
        return sorted(seen)

    listener = GradientHooks(pruner.layers, see)
    assert backward() == []
    listener.listen(True)
    assert backward() == [0, 1, 2]
    listener.listen(False)
    assert backward() == []
    pruner.layers[1].weight.requires_grad_(False)
    listener.listen(True)
    assert backward() == [0, 2]
    pruner.layers[1].weight.requires_grad_(True)
    listener.listen(True)
    assert backward() == [0, 1, 2]
    assert hooks(model) == 3 + 3  # with those of the sparse weights
    listener.remove()
    assert hooks(model) == 3
    assert backward() == []


def test_new_parameters_are_listened_to() -> None:
    """`load_state_dict(assign=True)` puts other parameters in the place of the old ones."""
    model = TwoTasks()
    pruner = prepare(model, allocation="sensitivity", total_steps=450, schedule=EARLY)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state, assign=True)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(45))
    assert pruner.controller.allocator.saliency[1].min() > 0


@pytest.mark.parametrize("steps", [7, 16])
def test_taylor_sees_the_gradients_of_parameters_that_were_assigned(steps: int) -> None:
    ends = []
    for assign in (False, True):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, method=Taylor(), total_steps=450)  # an update in every tenth step
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(steps))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(steps, steps + 3))
        ends.append([value.clone() for value in pruner.controller.stored("saliency")])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
