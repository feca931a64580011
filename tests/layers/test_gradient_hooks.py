"""Gradients as they come: whose, when, and on which parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, tensors, train

from torch_adapmtl import Adaptive, Method, Pruner, SparsitySchedule, Taylor
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


# --- gradients that are gone after the backward pass ----------------------------------------------

USERS = [Taylor(schedule=EARLY), Adaptive(schedule=EARLY, allocation="sensitivity")]
users = pytest.mark.parametrize("method", USERS, ids=lambda method: type(method).__name__)


def used(pruner: Pruner) -> list[Tensor]:
    """What a run has learned from gradients."""
    buffers = dict(pruner.controller.named_buffers())
    return [value for name, value in buffers.items() if "saliency" in name]


def ordinary(method: Method) -> tuple[dict[str, Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=method)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(12))
    return tensors(model), used(pruner)


def assert_ordinary(model: nn.Module, pruner: Pruner, method: Method) -> None:
    expected, statistic = ordinary(method)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model).items())
    assert all(torch.equal(*pair) for pair in zip(used(pruner), statistic, strict=True))
    assert all(value.any() for value in statistic)


@users
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("clear", ["to None", "to zero", "later"])
def test_an_optimiser_may_step_in_the_backward_pass(
    method: Method, early: bool, clear: str
) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizer = optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        if clear != "later":
            optimizer.zero_grad(set_to_none=clear == "to None")

    def register() -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    if early:
        register()
    pruner = prepare(model, method=method)
    if not early:
        register()
    for index in range(12):
        pruner.loss(losses(model, index)).backward()
        if clear == "later":
            model.zero_grad()
        pruner.step()
    assert_ordinary(model, pruner, method)


@users
@pytest.mark.parametrize("in_closure", [True, False])
def test_a_loop_may_compute_the_gradients_itself(method: Method, in_closure: bool) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(12):

        def closure(index: int = index) -> Tensor:
            loss = pruner.loss(losses(model, index))
            parameters = list(model.parameters())
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = grad
            return loss

        if in_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        pruner.step()
    assert_ordinary(model, pruner, method)


@users
def test_gradients_that_nobody_sees_are_warned_of_once(method: Method) -> None:
    model = TwoTasks()

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    pruner = prepare(model, method=method)

    def train_on() -> None:
        for index in range(20):
            pruner.loss(losses(model, index)).backward()
            pruner.step()

    with pytest.warns(UserWarning, match=r"needs the gradients .*has not seen any.*register") as w:
        train_on()
    assert len(w) == 1
