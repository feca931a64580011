"""Warnings at the end of a run that went wrong, and none at the end of one that did not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, train, weights, zeros

from torch_adapmtl import (
    Adaptive,
    Magnitude,
    Pruner,
    Report,
    SparsitySchedule,
    StabilityWeighting,
    apply_adapmtl,
)
from torch_adapmtl.run.diagnostics import signs
from torch_adapmtl.run.report import ComponentRow
from torch_adapmtl.weighting._record import LossRecord

STEPS = 40


def finished(pruner: Pruner) -> list[str]:
    """What `finalize` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.finalize()
    assert all(warning.filename == __file__ for warning in caught)  # the caller's line
    return [str(warning.message) for warning in caught]


def trained(scale: Any = lambda task, step: 1.0, first: int = 0, **options: Any) -> Pruner:
    """Train `TwoTasks` with its losses scaled by a function of task and step."""
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, total_steps=STEPS, **options)
    run(model, pruner, scale, range(first, STEPS))
    return pruner


def run(model: nn.Module, pruner: Pruner, scale: Any, steps: range) -> None:
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.01))
    for step in steps:
        found: Mapping[str, Tensor] = losses(model, step)
        pruner.loss({t: loss * scale(t, step) for t, loss in found.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_sparsity": 0.0},
        {"target_sparsity": 0.05},
        {"weighting": {"a": 9, "b": 1}},
        {"weighting": lambda losses: {task: 1 / (1 + loss) for task, loss in losses.items()}},
        {"allocation": "sensitivity"},
        {"method": "paper", "target_sparsity": 0.0},
    ],
)
def test_a_good_run_says_nothing(options: dict[str, Any]) -> None:
    assert finished(trained(**options)) == []


def test_equal_heads_of_different_tasks_say_nothing() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = TwoTasks(200)
        model.heads["b"] = nn.Linear(200, 5)
        model.body.requires_grad_(False)
        pruner = prepare(model, total_steps=STEPS, target_sparsity=0.5)
        optimizer = torch.optim.Adam(pruner.param_groups(lr=0.01))
        for _ in range(STEPS):
            x = torch.randn(16, 6)
            a, b = model(x).values()
            y = torch.cat([x.sin(), x.cos()], 1)
            found = {"a": (a - y[:, :5]).square().mean(), "b": (b - y[:, 5:10]).square().mean()}
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        assert finished(pruner) == []


class Twins(nn.Module):
    """Two components that are the same in everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.load_state_dict(self.a.state_dict())

    def losses(self) -> dict[str, Tensor]:
        return {task: (self.get_submodule(task).weight - 0.3).square().mean() for task in "ab"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"allocation": "sensitivity"}, 1),
        ({"allocation": "common"}, 0),
        ({"min_density": 0.25}, 0),
        ({"target_sparsity": 0.0}, 0),
    ],
)
def test_components_that_are_equally_sparse(options: dict[str, Any], expected: int) -> None:
    torch.manual_seed(0)
    model = Twins()
    groups = {"a": ["a"], "b": ["b"]}
    target = options.pop("target_sparsity", 0.75)
    pruner = apply_adapmtl(
        model,
        target_sparsity=target,
        total_steps=20,
        groups=groups,
        method=Adaptive(**options),
    )
    for _ in range(20):
        pruner.loss(model.losses()).backward()
        pruner.step()
    said = finished(pruner)
    assert len(said) == expected
    assert all("all components are equally sparse (75.00%)" in text for text in said)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": Magnitude()}, 1),
        ({"method": Magnitude("uniform")}, 0),
        ({}, 0),
    ],
)
def test_a_layer_without_weights(options: dict[str, Any], expected: int) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    with torch.no_grad():
        model.heads["b"].weight.mul_(1e-3)
    pruner = prepare(model, **options)
    train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=1e-3)), range(20))
    said = [text for text in finished(pruner) if "no weight" in text]
    assert len(said) == expected
    assert all("in 1 of 3 layers, such as 'heads.b.weight'" in text for text in said)


@pytest.mark.filterwarnings("ignore:.*no weight has changed")
@pytest.mark.parametrize(("bounds", "expected"), [(None, 1), ((0.5, 1.5), 0)])
def test_one_task_that_dominates(bounds: tuple[float, float] | None, expected: int) -> None:
    weighting = StabilityWeighting(["a", "b"], window=10, start=0, bounds=bounds)
    model = TwoTasks()
    pruner = prepare(model, total_steps=STEPS, weighting=weighting)
    for step in range(STEPS):
        found = losses(model, step)
        flat = found["a"] * 0 + 1.0  # cannot be learned
        pruner.loss({"a": flat, "b": found["b"]}).backward()
        pruner.step()
    said = [text for text in finished(pruner) if "task weights" in text]
    assert len(said) == expected
    assert all("task 'a' has taken" in text for text in said)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": SparsitySchedule(fix_at=0.7)},  # before the second of the steps below
        {"method": "paper", "target_sparsity": 0.0},
    ],
)
@pytest.mark.parametrize("since", [0, 3 * STEPS // 4])
def test_a_loss_that_diverges(since: int, options: dict[str, Any]) -> None:
    def scale(task: str, step: int) -> float:
        return 200 ** max((step - since) / (STEPS - since), 0) if task == "b" else 1.0

    said = finished(trained(scale, **options))
    assert len(said) == 1
    assert re.match("the loss of task 'b' ended at .*it diverged, or", said[0])


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity"])
def test_a_loss_that_comes_back_says_nothing(allocation: Any) -> None:
    def scale(task: str, step: int) -> float:
        return 8.0 if STEPS // 4 < step < STEPS // 2 else 1.0

    assert finished(trained(scale, allocation=allocation)) == []


def test_divergence_is_seen_across_a_resumed_run() -> None:
    def scale(task: str, step: int) -> float:
        return 1.1**step if task == "b" else 1.0

    torch.manual_seed(0)
    model = TwoTasks()
    half = prepare(model, total_steps=STEPS)
    run(model, half, scale, range(STEPS // 2))
    again = TwoTasks()
    pruner = prepare(again, total_steps=STEPS)
    again.load_state_dict(model.state_dict())
    run(again, pruner, scale, range(STEPS // 2, STEPS))
    before, after = (p.weighting.record.traces()["b"] for p in (half, pruner))
    assert before.first == after.first
    assert before.last < after.last
    assert any("the loss of task 'b' ended" in text for text in finished(pruner))


@pytest.mark.parametrize("others", [0.9, 0.85])
def test_signs_of_a_report(others: float) -> None:
    rows = [ComponentRow("shared", 1, 1000, 900), ComponentRow("a", 1, 1000, int(1000 * others))]
    report = Report(
        components=tuple(rows),
        layers=(),
        target_sparsity=0.9,
        step=1,
        total_steps=1,
        dense=[],
        task_weights={},
    )
    assert len(signs(report, LossRecord([]), allocated=True, task_weights={})) == (others == 0.9)
    assert signs(report, LossRecord([]), allocated=False, task_weights={}) == []
    dominated = signs(report, LossRecord([]), allocated=False, task_weights={"a": 1.7, "b": 0.3})
    assert len(dominated) == 1
    assert "task 'a' has taken 85%" in dominated[0]


# --- tasks that go missing ----------------------------------------------------------------------


def test_a_task_unseen_for_longer_than_its_window_is_reported_once() -> None:
    model = TwoTasks()
    weighting = StabilityWeighting(["a", "b"], window=5, start=0)
    pruner = prepare(model, total_steps=40, weighting=weighting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said: list[tuple[int, int]] = []
    for step in range(1, 41):
        found: dict[str, Any] = dict(losses(model, step))
        if 4 <= step < 20 or step >= 30:
            found["b"] = None
        pruner.loss(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        for warning in caught:
            text = re.match(r"task 'b' has had no loss for (\d+) steps", str(warning.message))
            assert text is not None
            said.append((step, int(text[1])))
    # The last loss was that of step 3, and the average task has a loss in every 2 * 11 / 14 steps.
    assert said == [(11, 8)]
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_tasks_that_take_turns_are_not_unseen() -> None:
    """A window of 10 losses of a task that has one in 20 steps reaches over 200 steps."""
    tasks = [f"t{i}" for i in range(20)]
    model = nn.Linear(4, 20)
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.5,
        total_steps=400,
        example_inputs=torch.ones(1, 4),
        task_outputs={task: lambda out, i=i: out[:, i] for i, task in enumerate(tasks)},
    )
    assert isinstance(pruner.weighting, StabilityWeighting)
    assert pruner.weighting.window == 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    said = []
    for step in range(400):
        turn = step % 20
        if turn == 3 and step >= 60:
            turn = 4  # from its fourth turn on this task goes missing
        x = torch.randn(8, 4)
        pruner.loss({tasks[turn]: (model(x)[:, turn] - x.sum(1)).square().mean()}).backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        said += [(step, str(warning.message)) for warning in caught]
    assert [text[:9] for _, text in said] == ["task 't3'"]
    last, gap = 43, 20
    assert last + 10 * gap < said[0][0] <= last + 11 * gap


def test_a_task_without_a_label_in_the_whole_run_is_told_at_the_end() -> None:
    model = TwoTasks()
    pruner = prepare(model, weighting="equal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        found = losses(model, step)
        pruner.loss({"a": found["a"], "b": found["b"] * 0}).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    other = TwoTasks()
    resumed = prepare(other, weighting="equal")
    other.load_state_dict(model.state_dict())
    for handle in (pruner, resumed):
        found = finished(handle)
        assert len(found) == 1
        assert re.match("all losses of task 'b' were exactly 0, .*labels.*exclude=", found[0])


def test_a_task_that_never_had_a_loss_is_told_at_the_end() -> None:
    model = TwoTasks()
    pruner = prepare(model, weighting="equal")
    for step in range(20):
        pruner.loss({"a": losses(model, step)["a"]}).backward()
        pruner.step()  # a warning would be an error here: equal weights have no window
        fresh = TwoTasks()
        other = prepare(fresh, weighting="equal")
        fresh.load_state_dict(model.state_dict())
    for handle in (pruner, other):  # the one that was resumed knows too
        found = [text for text in finished(handle) if "equally sparse" not in text]
        assert len(found) == 1
        assert re.match("task 'b' never had a loss.*exclude=", found[0])


# --- what does not train ---


def test_one_loss_without_grad_beside_others() -> None:
    """A batch without labels for a task is no mistake; a task that never learns is told at the end.

    A task may be frozen on purpose, so that it is no error.
    """
    said = []
    for always in (False, True):
        model = TwoTasks()
        pruner = prepare(model, total_steps=STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            found = losses(model, step)
            if always or step % 2:
                found["b"] = torch.zeros(())
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            with warnings.catch_warnings():
                if always:
                    warnings.filterwarnings("ignore", "task 'b' has had no loss")
                pruner.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.finalize()
        said.append([str(w.message) for w in caught if "task 'b'" in str(w.message)])
    assert said[0] == []
    assert len(said[1]) == 1
    assert "no loss of task 'b' ever required grad" in said[1][0]
    assert "leave the task out of the losses" in said[1][0]


def idle(model: nn.Module, pruner: Pruner, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            pruner.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("method", ["adaptive", "paper", Magnitude()])
def test_stepping_without_training_is_told_once(method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=400, method=method)
    said = idle(model, pruner, 400)
    assert len(said) == 1
    assert "no weight has changed since the first" in said[0]
    assert "call backward() and the optimizer's step()" in said[0]


class WritesData(torch.optim.SGD):
    """An optimiser of the kind that autograd does not see write."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(losses(model, 0).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, WritesData])
@pytest.mark.parametrize("before", [1, 40])
def test_training_that_is_hard_to_see(kind: Any, before: int) -> None:
    """Losses of the user's own, steps that a scaler skips, writes past autograd: all train."""
    model = TwoTasks()
    pruner = prepare(model, total_steps=400)
    optimizer = kind(model.parameters(), lr=0.1)
    assert idle(model, pruner, before) == []
    one_step(model, optimizer)
    assert idle(model, pruner, 400 - before) == []


def test_an_optimizer_that_a_resume_has_left_behind_is_noticed() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=400)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    idle(model, pruner, 100)
    other = TwoTasks()
    resumed = prepare(other, total_steps=400)
    other.load_state_dict(model.state_dict())
    assert len(idle(other, resumed, 300)) == 1
