"""Taking weights out of a run, or the pruner off a model, at any time."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import fx, nn
from toys import TwoTasks, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import (
    ST3,
    STR,
    Adaptive,
    Feather,
    Magnitude,
    Paper,
    SparsitySchedule,
    apply_adapmtl,
    keep_zeros,
    plain_state_dict,
)

METHODS = [
    Adaptive(), Adaptive(allocation="gradient"), Paper(start=-3.0), Magnitude(), ST3(), Feather(),
    STR(start=-1.2),
]  # fmt: skip


def run(steps: int, **options: Any) -> tuple[TwoTasks, Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, **options)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(steps))
    return model, pruner, optimizer


# --- a checkpoint as plain weights ----------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 8, 19, 20])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_checkpoint_becomes_plain_weights(method: Any, steps: int, prefix: str) -> None:
    model, pruner, _ = run(steps, method=method)
    saved = {prefix + name: value for name, value in model.state_dict().items()}
    before = dict(saved)
    plain = plain_state_dict(saved)
    assert saved == before  # the same objects
    fresh = TwoTasks()
    fresh.load_state_dict({name.removeprefix(prefix): value for name, value in plain.items()})
    x = torch.randn(4, 6)
    expected, found = model(x), fresh(x)
    assert all(torch.equal(found[task], expected[task]) for task in expected)
    used = [fresh.body.weight, *(head.weight for head in fresh.heads.values())]
    assert sum(int((w == 0).sum()) for w in used) == zeros(pruner)


def test_plain_states_stay_as_they_are() -> None:
    state = TwoTasks().state_dict()
    plain = plain_state_dict(state)
    assert plain is not state
    assert list(plain) == list(state)
    assert all(plain[name] is state[name] for name in state)


def test_a_damaged_state_is_refused() -> None:
    state = run(8)[0].state_dict()
    state["adapmtl._extra_state"] = state["adapmtl._extra_state"][:50]
    with pytest.raises(ValueError, match="damaged"):
        plain_state_dict(state)


# --- plain weights into a prepared model ----------------------------------------------------------


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("steps", [0, 8, 15, 20])
def test_plain_weights_are_loaded_entirely_or_not_at_all(part: bool, steps: int) -> None:
    model, pruner, optimizer = run(steps)
    torch.manual_seed(1)
    other = TwoTasks()
    if part:
        model.body.load_state_dict(other.body.state_dict())
        model.heads.load_state_dict(other.heads.state_dict(), strict=False)
    else:
        for strict in (True, False):
            with pytest.raises(ValueError, match=r"'body\.weight' of the model without apply_adap"):
                model.load_state_dict(other.state_dict(), strict=strict)
        return
    if not pruner.zeros_fixed:  # fixed zeros are written into what was loaded
        x = torch.randn(4, 6)
        expected, found = other(x), model(x)
        assert all(torch.equal(found[task], expected[task]) for task in expected)
    train(model, pruner, optimizer, range(steps, 20))
    pruner.finalize()
    used = [model.body.weight, *(head.weight for head in model.heads.values())]
    assert sum(int((w == 0).sum()) for w in used) == round(0.8 * 168)


@pytest.mark.parametrize("method", [Paper(), Adaptive(allocation="gradient")], ids=str)
def test_parts_with_trained_thresholds_refuse_plain_weights(method: Any) -> None:
    model, _, _ = run(8, method=method)
    before = tensors(model)
    for strict in (False, True):
        with pytest.raises(ValueError, match="of the model without apply_adapmtl"):
            model.body.load_state_dict(TwoTasks().body.state_dict(), strict=strict)
        with pytest.raises(ValueError, match="of the model without apply_adapmtl"):
            model.load_state_dict(TwoTasks().state_dict(), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


# --- graph modules --------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [saved_and_loaded, copy.deepcopy])
def test_a_graph_module_keeps_its_pruner(duplicate: Any) -> None:
    torch.manual_seed(0)
    model = fx.symbolic_trace(TwoTasks())
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(12))
    model.delete_all_unused_submodules()
    twin: Any = duplicate(model)
    assert twin.adapmtl is not pruner
    for one, own, opt in (
        (model, pruner, optimizer),
        (twin, twin.adapmtl, torch.optim.SGD(twin.parameters(), lr=0.1)),
    ):
        train(one, own, opt, range(12, 20))
        assert own.finalize() is one
        assert not hasattr(one, "adapmtl")
    expected = tensors(model)
    assert list(tensors(twin)) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(twin).items())
    assert sum(int((v == 0).sum()) for n, v in expected.items() if "weight" in n) == round(
        0.8 * 168
    )
    saved_and_loaded(model)  # a plain graph module again
    model.delete_all_unused_submodules()


# --- averages made before -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AveragedModel", "with buffers", "timm"])
def test_averages_made_before_go_on(kind: str) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    average: Any
    if kind == "timm":
        average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)
        update = average.update
    else:
        average = torch.optim.swa_utils.AveragedModel(
            model,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5),
            use_buffers=kind == "with buffers",
        )
        update = average.update_parameters
    pruner = prepare(model, schedule=SparsitySchedule(start=0.0, end=0.2, fix_at=0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    oracle = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(20):
        train(model, pruner, optimizer, [step])
        update(model)
        first = kind != "timm" and step == 0
        for name, p in model.named_parameters():
            oracle[name] = p.detach().clone() if first else (oracle[name] + p.detach()) / 2
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), oracle[name])


# --- without pruning ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 8, 13])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_undo_leaves_the_trained_dense_model(method: Any, steps: int) -> None:
    torch.manual_seed(0)
    dense, model = TwoTasks(), TwoTasks()
    model.load_state_dict(dense.state_dict())
    identities = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    pruner = prepare(model, method=method, weighting="equal")
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.0), momentum=0.9)  # weights stay
    train(model, pruner, optimizer, range(steps))
    assert pruner.step_count == steps
    assert not pruner.zeros_fixed
    assert pruner.undo() is model
    expected = tensors(dense)
    assert list(tensors(model)) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model).items())
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(RuntimeError, match=r"undo\(\) was called after"):
        pruner.undo()
    again = prepare(model)  # a notebook's cell, run twice
    train(model, again, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    assert zeros(again) == round(0.8 * weights(again))


def test_an_optimiser_trains_a_model_densely_after_undo() -> None:
    model, pruner, optimizer = run(15)
    pruner.undo()
    torch.manual_seed(0)
    other = TwoTasks()
    other.load_state_dict(model.state_dict())
    twin = torch.optim.SGD(other.parameters(), lr=0.1)
    for one, opt in ((model, optimizer), (other, twin)):
        opt.zero_grad()
        sum(losses(one, 3).values()).backward()
        opt.step()
    expected = tensors(other)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model).items())
    assert all(bool(p.all()) for p in model.parameters())


def test_the_best_checkpoint_once_it_is_sparse() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    for step in range(20):
        train(model, pruner, optimizer, [step])
        if pruner.zeros_fixed:
            kept.append((pruner.step_count, plain_state_dict(model.state_dict())))
    assert [step for step, _ in kept] == [18, 19, 20]
    for _, state in kept:
        matrices = [value for name, value in state.items() if "weight" in name]
        assert sum(int((w == 0).sum()) for w in matrices) == round(0.8 * 168)


# --- the end of a run, and calls that are forgotten -----------------------------------------------


def test_a_forgotten_step_is_warned_of_once() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=50)

    def forget() -> None:
        for step in range(300):
            pruner.loss(losses(model, step)).backward()

    with pytest.warns(UserWarning, match=r"loss\(\) was called 100 times without .*step\(\)") as w:
        forget()
    assert len(w) == 1


@pytest.mark.parametrize("attached", [False, True])
def test_steps_beyond_the_end_are_warned_of_once_and_do_nothing(attached: bool) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached:
        pruner.attach(optimizer)

    def train_on() -> None:
        for step in range(25):
            pruner.loss(losses(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not attached:
                pruner.step()
            assert pruner.step_count == min(step + 1, 20)

    with pytest.warns(UserWarning, match=r"step\(\) was called more than total_steps=20 ") as found:
        train_on()
    assert len(found) == 1
    assert pruner.sparsity() == round(0.8 * 168) / 168
    pruner.finalize()


def test_training_after_finalize_is_warned_of_once() -> None:
    model, pruner, optimizer = run(20)
    pruner.finalize()

    def train_on() -> None:
        for step in range(3):
            sum(losses(model, step).values()).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"'body\.weight' after finalize.*keep_zeros") as found:
        train_on()
    assert len(found) == 1


def test_training_after_finalize_with_zeros_kept_or_pruned_on_is_not_warned_of() -> None:
    model, pruner, optimizer = run(20)
    pruner.finalize()
    train(model, prepare(model, target_sparsity=0.9), optimizer, range(20))
    model.adapmtl.finalize()
    keep_zeros(model)
    sum(losses(model, 0).values()).backward()
    optimizer.step()


def test_the_error_of_an_early_finalize_says_that_zeros_are_not_fixed() -> None:
    model = nn.Linear(10, 10)
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.5,
        total_steps=10,
        groups={"main": ["*"]},
        method=Adaptive(schedule=SparsitySchedule(start=0.0, end=0.3)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(6):
        pruner.loss({"main": model(torch.ones(2, 10)).square().mean()}).backward()
        optimizer.step()
        pruner.step()
    assert pruner.sparsity() == 0.5
    with pytest.raises(RuntimeError, match=r"not fixed yet: 50\.00% .* are pruned now.*undo\(\)"):
        pruner.finalize()
