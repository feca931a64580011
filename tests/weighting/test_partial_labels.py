"""Labels that are missing, tasks with batches of their own, and weightings of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, prepare, train, weights, zeros

from torch_adapmtl import (
    Adaptive,
    SparsitySchedule,
    StabilityWeighting,
    apply_adapmtl,
    find_components,
)

EARLY = SparsitySchedule(start=0.0, end=0.5)


class ByTask(nn.Module):
    """Called once for each task, on inputs of that task's own width."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(4, 10)})
        self.body = nn.Linear(10, 12)
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 5), "b": nn.Linear(12, 3)})
        self.spare = nn.Linear(12, 2)

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.body(self.stems[task](x).relu()).tanh())


INPUTS = {"a": (torch.ones(2, 6), "a"), "b": (torch.ones(7, 4), "b")}


def own_loss(model: nn.Module, task: str, step: int) -> Tensor:
    """The loss of one task on a batch of its own size."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4 if task == "a" else 16, 6 if task == "a" else 4, generator=generator)
    out = model(x, task)
    return (out - x[:, : out.shape[1]].sin()).square().mean()


def test_components_of_a_model_that_is_called_by_task() -> None:
    found = find_components(ByTask(), task_inputs=INPUTS)
    names = {name: [tensor.name for tensor in found[name]] for name in (*found.names, "unused")}
    assert names == {
        "shared": ["body.weight"],
        "a": ["stems.a.weight", "heads.a.weight"],
        "b": ["stems.b.weight", "heads.b.weight"],
        "unused": ["spare.weight"],
    }
    by_keyword = {task: {"x": x, "task": name} for task, (x, name) in INPUTS.items()}
    assert str(find_components(ByTask(), task_inputs=by_keyword)) == str(found)


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity", "gradient"])
@pytest.mark.parametrize("order", ["both", "alternating", "rare"])
def test_tasks_with_batches_of_their_own(order: str, allocation: Any) -> None:
    model = ByTask()
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.8,
        total_steps=48,
        task_inputs=INPUTS,
        method=Adaptive(schedule=EARLY, allocation=allocation),
    )
    optimizer = torch.optim.Adam(pruner.param_groups(lr=3e-2))
    first = {task: own_loss(model, task, 0).item() for task in INPUTS}
    turns = {"both": ["a b"], "alternating": ["a", "b"], "rare": ["a", "a", "a", "b"]}[order]
    for step in range(48):
        tasks = turns[step % len(turns)].split()
        pruner.loss({task: own_loss(model, task, step) for task in tasks}).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    weighting = pruner.weighting
    assert isinstance(weighting, StabilityWeighting)
    seen = [sum(task in turn for turn in turns) * 48 // len(turns) for task in ("a", "b")]
    assert weighting.counts.tolist() == seen
    assert weighting.weights().sum().item() == pytest.approx(2.0)
    assert all(own_loss(model, task, 0).item() < first[task] for task in INPUTS)
    pruner.finalize()


def test_weights_do_not_depend_on_how_batches_are_dealt() -> None:
    """Each task's window holds its own losses in order, whoever came between."""
    values = {"a": [3.0, 2.5, 2.7, 2.0, 1.8, 1.9], "b": [5.0, 4.0, 4.5, 3.0, 3.5, 3.2]}
    dealt = {
        "together": [("a", "b")] * 6,
        "in turn": [("a",), ("b",)] * 6,
        "in blocks": [("a",)] * 6 + [("b",)] * 6,
    }
    found = []
    for turns in dealt.values():
        weighting = StabilityWeighting(["a", "b"], window=4, start=0)
        streams = {task: iter(own) for task, own in values.items()}
        for turn in turns:
            weighting({task: torch.tensor(next(streams[task])) for task in turn})
        found.append(weighting.weights())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_samples_without_a_label() -> None:
    """A loss over the samples that have one; a batch without any has none."""
    model = TwoTasks()
    pruner = prepare(model, total_steps=30, schedule=EARLY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    given = 0
    for step in range(30):
        x, targets = batch(step)
        out = model(x)
        generator = torch.Generator().manual_seed(step)
        found: dict[str, Tensor | None] = {}
        for task, target in targets.items():
            there = torch.rand(len(x), generator=generator) < 0.2
            error = (out[task] - target)[there].square()
            found[task] = error.mean() if there.any() else None
        if any(loss is not None for loss in found.values()):
            pruner.loss(found).backward()
            optimizer.step()
        given += found["a"] is not None
        optimizer.zero_grad()
        pruner.step()
    weighting = pruner.weighting
    assert isinstance(weighting, StabilityWeighting)
    assert weighting.counts[0] == given < 30
    assert zeros(pruner) == round(0.8 * weights(pruner))


@pytest.mark.parametrize("aggregator", ["AlignedMTL", "MGDA", "PCGrad", "Mean"])
def test_aggregators_of_torchjd_in_place_of_our_weighting(aggregator: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    autojac = pytest.importorskip("torchjd.autojac")

    model = TwoTasks()
    pruner = prepare(model, total_steps=30, schedule=EARLY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = {task: loss.item() for task, loss in losses(model, 0).items()}
    for step in range(30):
        x, targets = batch(step)
        features = model.body(x).tanh()
        found = [
            (head(features) - targets[task]).square().mean() for task, head in model.heads.items()
        ]
        autojac.mtl_backward(found, features=features)
        autojac.jac_to_grad(model.body.parameters(), getattr(aggregation, aggregator)())
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    assert all(loss.item() < first[task] for task, loss in losses(model, 0).items())
    pruner.finalize()


def test_weights_that_another_library_finds() -> None:
    """A callable from losses to weights, here random ones as in RLW (LibMTL)."""

    def random_weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn = torch.randn(len(found)).softmax(0)
        return dict(zip(found, drawn, strict=True))

    model = TwoTasks()
    pruner = prepare(model, weighting=random_weights, schedule=EARLY)
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20))
    assert zeros(pruner) == round(0.8 * weights(pruner))
    assert pruner.weighting.weights().sum().item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"example_inputs": torch.ones(2, 6)}, ValueError, "task_inputs .* and example_inputs"),
        ({"task_outputs": ["a", "b"]}, ValueError, "task_inputs .* and task_outputs"),
        ({"task_inputs": {}}, TypeError, "task_inputs must map each task .*found {}"),
        ({"task_inputs": [1]}, TypeError, r"task_inputs must map .*found \[1\]"),
        ({"task_inputs": {"a+b": (1,)}}, ValueError, r"task_inputs"),
        ({"task_inputs": {"a": (torch.ones(2, 3), "a")}}, RuntimeError, r"on task_inputs\['a'\]"),
    ],
)
def test_refused_task_inputs(options: Any, error: type[Exception], message: str) -> None:
    model = ByTask()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        find_components(model, **{"task_inputs": INPUTS, **options})
    assert list(model.state_dict()) == keys
