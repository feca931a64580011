"""Labels that are missing, tasks with batches of their own, and weightings of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import two_that_meet
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, prepare, train, weights, zeros
from weightings import TASKS, WEIGHTINGS, all_weightings, as_losses, feed

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
        weighting="stability",
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


# --- a loss of exactly 0 says that the batch has no labels ---

NO_LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "0 * out.sum()": lambda out: 0 * out.sum(),
    "a masked sum over a clamped count": lambda out: out[out > torch.inf].sum() / 1,
    "a product with the mask": lambda out: (out.square() * 0).sum() / (0 + 1e-8),
    "nan_to_num": lambda out: out[:0].mean().nan_to_num(),
    "made anew": lambda out: torch.zeros(()),
    "minus 0": lambda out: -0.0 * out.square().sum(),
}


@pytest.mark.parametrize("weighting", ["stability", "deviation"])
@pytest.mark.parametrize("how", NO_LABELS)
def test_a_run_with_losses_of_0_is_one_without_these_losses(how: str, weighting: str) -> None:
    """Plain SGD, so that a gradient of 0 moves a head as little as no gradient."""
    found = []
    for loss_of in (lambda out: None, NO_LABELS[how]):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, total_steps=45, schedule=EARLY, weighting=weighting)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(45):
            x, targets = batch(step)
            out = model(x)
            given = {task: (out[task] - y).square().mean() for task, y in targets.items()}
            if step % 3 == 0:
                given["b"] = loss_of(out["b"])
            pruner.loss(given).backward()
            if step % 3 == 0 and given["b"] is not None and given["b"].requires_grad:
                # DistributedDataParallel waits for a gradient of every parameter.
                assert torch.equal(model.heads["b"].bias.grad, torch.zeros(3))
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        assert pruner.weighting.counts.tolist() == [45, 30]
        found.append((pruner.weighting.as_dict(), pruner.weighting.record.courses()))
        pruner.finalize()
        found[-1] += (list(model.parameters()),)
    assert found[0][:2] == found[1][:2]
    assert found[0][0]["a"] != 1
    for with_none, with_zero in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(with_none, with_zero)


@pytest.mark.parametrize("direction", ["stable", "deviating"])
@pytest.mark.parametrize("task", ["Depth", "Map", "Normals", "Segmentation"])
def test_a_task_of_the_kit_says_that_it_saw_nothing(task: str, direction: Any) -> None:
    kit = pytest.importorskip("torch_adapmtl.tasks")
    measure = kit.Segmentation(3) if task == "Segmentation" else getattr(kit, task)()
    unknown = {"Map": torch.nan, "Segmentation": 255}.get(task, 0)
    rows: list[Any] = []
    for step in range(30):
        out = torch.randn(2, 3, 4, 4, requires_grad=True)
        other = torch.rand(()) + 1
        target = {
            "Depth": torch.rand(2, 3, 4, 4) + 1,
            "Map": torch.rand(2, 3, 4, 4),
            "Normals": nn.functional.normalize(torch.randn(2, 3, 4, 4), dim=1),
            "Segmentation": torch.randint(3, (2, 4, 4)),
        }[task]
        labelled = step % 4 != 1
        loss = measure.loss(out, target if labelled else torch.full_like(target, unknown))
        loss.backward(retain_graph=True)
        assert (loss.item() > 0) == bool(out.grad.any()) == labelled
        rows.append((other, loss if labelled else None, loss))
    kinds = [StabilityWeighting(["a", "b"], window=8, start=0, direction=direction) for _ in "012"]
    for other, missing, zero in rows:
        kinds[0]({"a": other, "b": missing})
        kinds[1]({"a": other, "b": zero})
        if missing is not None:
            kinds[2]({"b": zero})  # the batches left out
        kinds[2]({"a": other})
    assert kinds[0].as_dict() == kinds[1].as_dict() == kinds[2].as_dict()
    assert kinds[0].as_dict()["b"] != 1


@WEIGHTINGS
@given(
    rows=st.lists(
        st.lists(st.one_of(st.just(0.0), st.floats(0.1, 9)), min_size=3, max_size=3), max_size=12
    )
)
def test_a_loss_of_0_counts_as_none(index: int, rows: list[list[float]]) -> None:
    """In the weights, in all that is stored, and in the sum."""
    tasks = tuple(f"t{i}" for i in range(len(TASKS)))
    rows = [row for row in rows if any(row)]
    with_none, with_zero = all_weightings(tasks)[index], all_weightings(tasks)[index]
    for row in rows:
        expected = with_none(as_losses([value or None for value in row]))
        assert with_zero(as_losses(list(row))) == expected
    assert with_zero.as_dict() == with_none.as_dict()
    for name, buffer in with_none.named_buffers():
        assert torch.equal(with_zero.get_buffer(name), buffer), name


@pytest.mark.parametrize("direction", ["stable", "deviating"])
def test_batches_without_any_label_may_be_left_out(direction: Any) -> None:
    rows: list[list[float | None]] = [[2.0 - step / 20, 1.0 + step % 3] for step in range(20)]
    weighting = StabilityWeighting(["t0", "t1"], window=6, start=0, direction=direction)
    expected = feed(weighting, rows).as_dict()
    weighting = StabilityWeighting(["t0", "t1"], window=6, start=0, direction=direction)
    feed(weighting, [row for pair in zip(rows, [[0.0, 0.0]] * 20, strict=True) for row in pair])
    assert weighting.as_dict() == expected != {"t0": 1.0, "t1": 1.0}


def test_a_mean_over_nothing_is_still_told() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    found = losses(model, 0)
    found["b"] = model(batch(0)[0])["b"][:0].mean()
    total = pruner.loss(found)
    assert total.isnan()
    assert pruner.weighting.counts.tolist() == [1, 0]
    total.backward()
    with pytest.raises(RuntimeError, match=r"NaN or infinite loss of the tasks 'b' \(1x\)"):
        pruner.step()


def _labels_in_turn(rank: int, folder: str) -> None:
    found = []
    for missing in (None, 0.0):
        weighting = StabilityWeighting(["t0", "t1"], window=6, start=0)
        generator = torch.Generator().manual_seed(rank)
        for step in range(20):
            row: list[float | None] = torch.rand(2, generator=generator).tolist()
            if (step + rank) % 2 or step % 3 == 0:  # in one of the two, or in neither
                row[1] = missing
            weighting(as_losses(row))
        found.append(dict(weighting.state_dict()))
        assert weighting.counts.tolist() == [20, 13]
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
    torch.save(found[0], f"{folder}/found{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_processes_that_see_labels_in_turn(tmp_path: Path) -> None:
    """The mean is over the processes that have labels; in all, the weights are the same."""
    two_that_meet(_labels_in_turn, tmp_path)
    first, second = (torch.load(tmp_path / f"found{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


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
