"""Warnings at the end of a run that went wrong, and none at the end of one that did not."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch_adapmtl.run.report import ComponentRow, LayerRow
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


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity", "common"])
def test_components_that_are_alike_may_be_equally_sparse(allocation: Any) -> None:
    torch.manual_seed(0)
    model = Twins()
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.75,
        total_steps=20,
        groups={"a": ["a"], "b": ["b"]},
        method=Adaptive(allocation=allocation),
    )
    for _ in range(20):
        pruner.loss(model.losses()).backward()
        pruner.step()
    assert pruner.sparsity("component") == {"a": 0.75, "b": 0.75}
    assert finished(pruner) == []


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
    before, after = (p.weighting.record.courses()["b"] for p in (half, pruner))
    assert before.first == after.first
    assert before.last < after.last
    assert any("the loss of task 'b' ended" in text for text in finished(pruner))


# --- a net that was trained to a loss near zero, and then pruned ---


class Expert(nn.Module):
    """A classification and a regression that it knows by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.heads = nn.ModuleDict({"kind": nn.Linear(128, 6), "size": nn.Linear(128, 1)})
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(1536, 8, generator=generator)
        self.kinds = (self.inputs @ torch.randn(8, 6, generator=generator)).argmax(1)
        x, y, z = self.inputs[:, :3].T
        self.sizes = 2 * (x.sin() + y.sin()) * z.tanh()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {task: head(h) for task, head in self.heads.items()}

    def errors(self, rows: Tensor | slice) -> dict[str, Tensor]:
        out = self(self.inputs[rows])
        return {
            "kind": F.cross_entropy(out["kind"], self.kinds[rows], reduction="none"),
            "size": (out["size"][:, 0] - self.sizes[rows]).square(),
        }

    def losses(self, step: int) -> dict[str, Tensor]:
        """The losses on a batch of the training set."""
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(1024, (64,), generator=generator)
        return {task: error.mean() for task, error in self.errors(rows).items()}

    @torch.no_grad()
    def scores(self) -> tuple[float, float]:
        """On the test set, the accuracy and the explained share of the variance."""
        test = slice(1024, None)
        wrong = self(self.inputs[test])["kind"].argmax(1) != self.kinds[test]
        unexplained = self.errors(test)["size"].mean() / self.sizes[test].var()
        return 1 - wrong.float().mean().item(), 1 - unexplained.item()


@pytest.fixture(scope="module")
def expert() -> Expert:
    torch.manual_seed(0)
    model = Expert()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(800):
        torch.stack(list(model.losses(step).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(loss.item() < 0.03 for loss in model.losses(0).values())
    return model


def pruned(
    expert: Expert,
    target: float,
    steps: int,
    lr: float,
    unit: float = 1.0,
    after: int = 0,
    decay: float = 1.0,
) -> tuple[Expert, list[str], Pruner]:
    """Prune a copy; what is said of it. The regression's loss is in a unit of its own."""
    model = copy.deepcopy(expert)
    pruner = apply_adapmtl(
        model,
        target_sparsity=target,
        total_steps=steps,
        example_inputs=torch.ones(2, 8),
        weighting={"kind": unit, "size": 1},  # so that the unit does not matter in training
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    for step in range(steps + after):
        found = model.losses(1000 + step)
        pruner.loss({"kind": found["kind"], "size": found["size"] * unit}).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step < steps:
            pruner.step()
    return model, finished(pruner), pruner


@pytest.mark.parametrize("unit", [1e-3, 1.0, 30.0, 1e4])
def test_a_healthy_finetune_of_an_expert_says_nothing(expert: Expert, unit: float) -> None:
    """Whatever the unit of a loss, and though it ends at many times its first value."""
    before = expert.scores()
    model, said, pruner = pruned(expert, target=0.9, steps=300, lr=1e-3, unit=unit)
    assert all(now > then - 0.02 for now, then in zip(model.scores(), before, strict=True))
    courses = pruner.weighting.record.courses().values()
    assert all(course.last > 3 * course.first for course in courses)
    assert said == []


def test_an_expert_that_is_pruned_to_nothing_has_lost_what_it_knew(expert: Expert) -> None:
    model, said, _ = pruned(expert, target=0.999, steps=100, lr=1e-3)
    assert max(model.scores()) < 0.4
    assert len(said) == 2
    assert all(
        f"the loss of task {task!r} ended at" in text
        for task, text in zip(("kind", "size"), said, strict=True)
    )


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_an_expert_that_diverges_is_told(expert: Expert, unit: float) -> None:
    """In the second step already, so that only the first loss shows that it was one."""
    model, said, pruner = pruned(expert, target=0.5, steps=100, lr=1.0, unit=unit, decay=0.95)
    assert max(model.scores()) < 0.6
    assert pruner.weighting.record.courses()["size"].first < 0.03 * unit
    assert len(said) == 2
    assert all("it diverged, or the model lost what it knew" in text for text in said)


def test_an_expert_that_recovers_after_the_last_step_says_nothing(expert: Expert) -> None:
    _, said, _ = pruned(expert, target=0.95, steps=20, lr=3e-3)
    assert said
    model, said, _ = pruned(expert, target=0.95, steps=20, lr=3e-3, after=500)
    assert min(model.scores()) > 0.75
    assert said == []


@pytest.mark.parametrize(
    ("outputs", "course", "lost"),
    [  # of pruned nets: digits, their parity, and regressions with targets of variance 1 and 100
        (10, (0.0170, 0.0053, 0.93, 0.759), False),  # accuracy 97.6 -> 95.4
        (10, (0.0074, 0.0053, 2.14, 2.140), True),  # 97.6 -> 36.2
        (10, (0.0700, 0.0680, 1.15, 0.980), False),  # 96.6 -> 96.4
        (10, (0.0050, 0.0050, 3766.0, 2.35), True),  # 97.6 -> 10.5, by its learning rate
        (10, (0.0031, 0.0030, 1.91, 1.320), True),  # 99.2 -> 64.4
        (2, (0.00007, 0.00007, 2.19, 0.019), False),  # 97.8 -> 98.2
        (2, (0.00056, 0.00056, 22.9, 0.050), False),  # 99.6 -> 97.2
        (2, (0.0018, 0.0010, 0.484, 0.416), True),  # 98.0 -> 85.3
        (1, (0.0056, 0.0024, 0.11, 0.0146), False),  # explained variance 0.967 -> 0.958
        (1, (0.0056, 0.0037, 0.79, 0.696), True),  # 0.967 -> 0.386
        (1, (0.125, 0.125, 10.5, 1.197), False),  # 0.978 -> 0.961
        (1, (0.920, 0.920, 78.8, 70.1), True),  # 0.965 -> 0.380
    ],
)
def test_courses_of_runs(outputs: int, course: tuple[float, ...], lost: bool) -> None:
    record = LossRecord(["a"])
    first, lowest, highest, last = course
    record.course.copy_(torch.tensor([[first], [last], [lowest], [highest], [50.0]]))
    report = Report(
        components=(ComponentRow("a", 1, 1000, 900),),
        layers=(
            LayerRow("body", "a", (64, 8), 400, 0.0),
            LayerRow("a", "a", (outputs, 64), 1, 0.0),
        ),
        target_sparsity=0.9,
        step=1,
        total_steps=1,
        dense=[],
        task_weights={},
    )
    assert [text[:18] for text in signs(report, record, task_weights={})] == (
        ["the loss of task '"] if lost else []
    )


def test_what_was_learned_and_lost_in_one_run_is_told(expert: Expert) -> None:
    """From scratch: the loss ends no higher than it began."""
    torch.manual_seed(0)
    model = Expert()
    pruner = apply_adapmtl(
        model, target_sparsity=0.5, total_steps=400, example_inputs=torch.ones(2, 8)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        if step == 360:
            optimizer.param_groups[0]["lr"] = 1.0
        pruner.loss(model.losses(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    said = finished(pruner)
    assert said
    assert all("ended at" in text for text in said)


def test_one_task_that_dominates_in_a_report() -> None:
    report = Report(
        components=(ComponentRow("shared", 1, 1000, 900), ComponentRow("a", 1, 1000, 900)),
        layers=(),
        target_sparsity=0.9,
        step=1,
        total_steps=1,
        dense=[],
        task_weights={},
    )
    assert signs(report, LossRecord([]), task_weights={"a": 1.5, "b": 0.5}) == []
    dominated = signs(report, LossRecord([]), task_weights={"a": 1.7, "b": 0.3})
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
        weighting="stability",
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
        found = finished(handle)
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
