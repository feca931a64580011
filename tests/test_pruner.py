"""The pruner: the loop of three lines, the end, reports, and what it refuses."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from refusals import STEPS, Row, Scene, assert_refused, rows, running
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from toys import (
    TwoTasks,
    batch,
    losses,
    prepare,
    pruned,
    tensors,
    train,
    weights,
    zeros,
)

from torch_adapmtl import Paper, Report, Taylor

# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("own_groups", [True, False])
def test_three_lines(own_groups: bool) -> None:
    model = TwoTasks()
    identities = {name: id(p) for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    before = torch.optim.AdamW(model.parameters(), lr=1e-2)

    pruner = prepare(model)
    assert model.adapmtl is pruner
    assert pruner.components.names == ("shared", "a", "b")
    assert pruner.tasks == ("a", "b")
    assert prune.is_pruned(model)
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-2)) if own_groups else before
    train(model, pruner, optimizer, range(10))
    layers = [module for name, module in model.named_modules() if "adapmtl" not in name]
    assert [type(layer) for layer in layers] == list(classes.values())
    assert [key for key in model.state_dict() if "adapmtl" not in key] == keys
    assert all(identities[name] == id(p) for name, p in model.named_parameters())
    train(model, pruner, optimizer, range(10, 20))
    assert pruner.sparsity() == round(0.8 * weights(pruner)) / weights(pruner)

    model.eval()
    x = batch(77)[0]
    expected = model(x)
    assert pruner.finalize() is model
    found = model(x)
    assert all(torch.equal(expected[task], found[task]) for task in expected)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not prune.is_pruned(model)
    assert not hasattr(model, "adapmtl")
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not parametrize.is_parametrized(module)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    # And training goes on, now without any mask.
    sum(losses(model, 0).values()).backward()
    with pytest.warns(UserWarning, match="after finalize"):
        optimizer.step()
    assert zeros(pruner) < round(0.8 * weights(pruner))


def test_nothing_of_the_pruner_is_kept_alive() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    pruner.finalize()
    alive = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert alive() is None


def test_survivors_that_became_zero_do_not_spoil_the_count() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    pruner.fix_zeros()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert zeros(pruner) == weights(pruner)
    with pytest.warns(UserWarning, match="no weight is left in 3 of 3 layers"):
        pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_zeros_stay_under_momentum_and_decay() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, pruner, optimizer, range(20))
    gone = {t.name: getattr(*t.owners[0]) == 0 for t in pruned(pruner)}
    for step in range(20, 30):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
    for tensor in pruned(pruner):
        assert torch.equal(getattr(*tensor.owners[0]) == 0, gone[tensor.name])
    pruner.finalize()
    for tensor in pruned(pruner):
        assert torch.equal(tensor.parameter == 0, gone[tensor.name])


def test_a_model_that_has_lost_a_weight_does_not_disturb_another() -> None:
    lost, model = TwoTasks(), TwoTasks()
    broken, pruner = prepare(lost), prepare(model)
    train(lost, broken, torch.optim.SGD(lost.parameters(), lr=0.1), range(5))
    parametrizations.weight_norm(lost.body)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    assert zeros(pruner) == round(0.8 * weights(pruner))
    with pytest.raises(RuntimeError, match=r"'body.weight' is no longer a parameter"):
        train(lost, broken, torch.optim.SGD(lost.parameters(), lr=0.1), range(5, 10))


def test_attach_saves_the_third_line() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner.attach(optimizer)
    for step in range(25):  # five more than total_steps
        pruner.loss(losses(model, step)).backward()
        with pytest.warns(UserWarning, match="more than") if step == 20 else nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    assert zeros(pruner) == round(0.8 * weights(pruner))

    torch.manual_seed(0)
    other = TwoTasks()
    plain = prepare(other)
    again = torch.optim.Adam(other.parameters(), lr=1e-2)
    train(other, plain, again, range(20))
    for step in range(20, 25):
        plain.loss(losses(other, step)).backward()
        again.step()
        again.zero_grad()
    plain.finalize()
    pruner.finalize()
    expected = other.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    pruner = prepare(model)
    pruner.attach(optimizer)  # the hook of before is gone
    optimizer.step()
    assert pruner.report().step == 1


class _Derived(torch.optim.SGD):
    """Calls the step of its base class, which torch hooks too if there is an optimiser of it."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_the_one_of_the_base_class_counts_once() -> None:
    torch.optim.SGD(TwoTasks().parameters(), lr=0.1)
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = _Derived(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for step in range(5):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert pruner.step_count == step + 1


def test_attaching_ends_with_finalize() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    pruner.fix_zeros()
    assert optimizer._optimizer_step_post_hooks  # another target may follow
    optimizer.step()  # nothing is left to move
    pruner.finalize()
    assert not optimizer._optimizer_step_post_hooks


def test_an_early_end_prunes_to_the_target() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(3))
    pruner.fix_zeros()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    ended = tensors(model)
    pruner.fix_zeros()  # once more changes nothing
    assert all(torch.equal(value, ended[key]) for key, value in tensors(model).items())
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


# --- looking at it ------------------------------------------------------------------------------


def test_sparsity_and_report_count_what_the_model_sees() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=50)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    report = pruner.report()
    assert isinstance(report, Report)
    assert (report.step, report.total_steps, report.target_sparsity) == (20, 50, 0.8)
    found = {
        "shared": model.body.weight,
        "a": model.heads["a"].weight,
        "b": model.heads["b"].weight,
    }
    expected = {name: float((w == 0).float().mean()) for name, w in found.items()}
    assert pruner.sparsity("component") == pytest.approx(expected)
    assert list(pruner.sparsity("layer")) == ["body.weight", "heads.a.weight", "heads.b.weight"]
    assert pruner.sparsity() == zeros(pruner) / weights(pruner)
    assert 0 < pruner.sparsity() < 0.8
    for row, weight in zip(report.layers, found.values(), strict=True):
        assert row.zeros == int((weight == 0).sum())
        assert row.shape == tuple(weight.shape)
    with pruner.sparse_weights.dense():
        for row, weight in zip(report.layers, found.values(), strict=True):
            assert row.zeros == int((weight.abs() <= row.threshold).sum())
        assert pruner.report() == report
    assert sum(report.task_weights.values()) == pytest.approx(2)
    assert "shared" in str(report)


# --- what is refused ---

V, T, R = ValueError, TypeError, RuntimeError
MISUSES = [
    running("finalising early", lambda s: s.pruner.finalize(), R, "finalize()",
            f"after 3 of total_steps={STEPS}", "Call fix_zeros()"),
    running("attaching twice", lambda s: s.pruner.attach(s.optimizer), R, "attach()",
            "called already", "leave out this call", first=lambda s: s.pruner.attach(s.optimizer),
            goes_on=False),
    running("stepping beside attach", lambda s: s.pruner.step(), R, "step()",
            "attach() was given", "leave out your own call",
            first=lambda s: s.pruner.attach(s.optimizer), goes_on=False),
    *(
        running(f"{what}, then {name}", do, R, "'body.weight'", found, remedy, goes_on=False,
                first=first, options=options)
        for what, first, found, remedy, options in (
            ("a threshold removed", lambda s: prune.remove(s.model.body, "weight"),
             "has lost its soft threshold", "call finalize() instead",
             {"allocation": "gradient"}),
            ("a mask added", lambda s: prune.l1_unstructured(s.model.body, "weight", 0.5),
             "was masked by torch.nn.utils.prune", "prune before apply_adapmtl", {}),
            ("a layer replaced", lambda s: setattr(s.model, "body", nn.Linear(6, 12)),
             "is no longer in the model", "leave this layer out (exclude=)", {}),
            ("a layer deleted", lambda s: delattr(s.model, "body"),
             "is no longer in the model", "leave this layer out (exclude=)", {}),
            ("a weight computed", lambda s: parametrizations.weight_norm(s.model.body),
             "is no longer a parameter", "leave this layer out (exclude=)", {}),
        )
        for name, do in (("a step", lambda s: s.pruner.step()),
                         ("an end", lambda s: s.pruner.fix_zeros()),
                         ("a look", lambda s: s.pruner.report()),
                         ("another target", lambda s: s.pruner.retarget(0.9, total_steps=5)))
    ),
    *(
        running(f"{what}, at the end", lambda s: s.pruner.finalize(), R, "'body.weight'", found,
                "exclude=", goes_on=False, first=first, after=STEPS)
        for what, first, found in (
            ("a layer replaced", lambda s: setattr(s.model, "body", nn.Linear(6, 12)),
             "is no longer in the model"),
            ("a weight computed", lambda s: parametrizations.weight_norm(s.model.body),
             "is no longer a parameter"),
        )
    ),
    running("attaching a name", lambda s: s.pruner.attach("adam"), T, "optimizer", "got a str",
            "pass the one that trains the model"),
    running("attaching a scheduler",
            lambda s: s.pruner.attach(torch.optim.lr_scheduler.StepLR(s.optimizer, 1)), T,
            "optimizer", "got a StepLR", "pass the one that trains the model", after=0),
    *(
        running(f"{name} {value!r}", lambda s, o={name: value}: s.pruner.param_groups(**o), error,
                name, f"got {value!r}", remedy, options={"allocation": "gradient"})
        for name in ("threshold_lr", "lr")
        for value, error, remedy in (
            (-0.1, V, "a finite number >= 0"), (math.nan, V, "a finite number >= 0"),
            (math.inf, V, "a finite number >= 0"), ("high", T, "a number"), (True, T, "a number"),
        )
    ),
    running("groups with parameters", lambda s: s.pruner.param_groups(params=[]), T, "params",
            "must be left out", "param_groups puts"),
    running("sparsity by head", lambda s: s.pruner.sparsity("head"), V, "by", "'head'",
            "'overall', 'component', 'layer'"),
    *(
        running(f"another target: {found}", lambda s, o=options: s.pruner.retarget(**o), V, named,
                f"got {found}", remedy)
        for options, named, found, remedy in (
            ({"target_sparsity": 1.0, "total_steps": 5}, "target_sparsity", "1.0", "90 % is 0.9"),
            ({"target_sparsity": 0.5, "total_steps": 0}, "total_steps", "0", "integer >= 1"),
        )
    ),
    *(
        running(f"another target for {method}", lambda s: s.pruner.retarget(0.9, total_steps=5),
                R, "retarget()", "needs method='adaptive'", "call finalize()", after=0,
                options={"method": method})
        for method in (Paper(start=-3.0), Taylor())
    ),
    running("another target out of bounds", lambda s: s.pruner.retarget(0.95, total_steps=5), V,
            "target_sparsity=0.95", "min_density", "Change the target",
            options={"min_density": 0.15}, after=STEPS),
]  # fmt: skip


def finalised(id: str, do: Callable[[Scene], object]) -> Row:
    """A call on the pruner of a model that is plain again."""
    return running(
        f"{id} late", do, R, f"{id}()", "after finalize()", "Call apply_adapmtl", after=STEPS,
        first=lambda s: s.pruner.finalize(),
    )  # fmt: skip


LATE = [
    finalised("finalize", lambda s: s.pruner.finalize()),
    finalised("step", lambda s: s.pruner.step()),
    finalised("fix_zeros", lambda s: s.pruner.fix_zeros()),
    finalised("retarget", lambda s: s.pruner.retarget(0.9, total_steps=5)),
    finalised("report", lambda s: s.pruner.report()),
    finalised("sparsity", lambda s: s.pruner.sparsity()),
    finalised("loss", lambda s: s.pruner.loss(losses(s.model, 0))),
    finalised("attach", lambda s: s.pruner.attach(s.optimizer)),
    finalised("param_groups", lambda s: s.pruner.param_groups(lr=1.0)),
]


@pytest.mark.filterwarnings("ignore:the run ended at a sparsity", "ignore:no weight is left")
@rows([*MISUSES, *LATE])
def test_refused(row: Row) -> None:
    assert_refused(row)
