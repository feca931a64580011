"""The history of a run: what a loop records that records everything, bounded, without waiting."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from html_tables import tables_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import TwoTasks, losses, prepare, train
from waiting import refused

from torch_adapmtl import (
    ACDC,
    SNIP,
    ST3,
    STR,
    DiSparse,
    Feather,
    GraNet,
    History,
    IterativeMagnitude,
    Magnitude,
    Paper,
    Pruner,
    RigL,
    SparsitySchedule,
    Taylor,
    TopKAST,
)

EARLY = SparsitySchedule(start=0.0, end=0.5)
RUNS: dict[str, dict[str, Any]] = {
    "adaptive": {"schedule": EARLY},
    "macs": {"schedule": EARLY, "count": "macs"},
    "gradient": {"schedule": EARLY, "allocation": "gradient"},
    "sensitivity": {"schedule": EARLY, "allocation": "sensitivity", "weighting": "equal"},
    "paper": {"method": Paper(start=-3.0, weight_decay=0.1)},
    "st3": {"method": ST3()},
    "feather": {"method": Feather()},
    "str": {"method": STR(start=-1.2)},
    "magnitude": {"method": Magnitude()},
    "taylor": {"method": Taylor()},
    "iterative": {"method": IterativeMagnitude(rewind=True)},
    "snip": {"method": SNIP()},
    "disparse": {"method": DiSparse(dynamic=True)},
    "acdc": {"method": ACDC()},
    "granet": {"method": GraNet()},
    "top-kast": {"method": TopKAST()},
    "rigl": {"method": RigL()},
}
WITH_THRESHOLDS = ("adaptive", "macs", "gradient", "sensitivity", "paper", "st3", "feather", "str")
METHODS = pytest.mark.parametrize("name", RUNS)


def recorded(
    model: TwoTasks, pruner: Pruner, steps: Sequence[int], *, attached: bool = False
) -> list[dict[str, float]]:
    """Train in a loop that records everything itself after every step: the oracle."""
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
    if attached:
        pruner.attach(optimizer)
    found = []
    for step in steps:
        given: dict[str, Tensor | None] = dict(losses(model, step))
        if step % 3 == 2:
            given["b"] = None
        if step % 4 == 1:
            given["a"] = 0.0 * given["a"]  # no labels
        pruner.loss(given).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            pruner.step()
        row = {"step": step + 1, **pruner.report().scalars()}
        for task, loss in given.items():
            row.pop(f"loss/{task}", None)
            if loss is not None and loss.item() != 0:
                row[f"loss/{task}"] = loss.item()
        found.append(row)
    return found


@METHODS
@pytest.mark.parametrize("attached", [False, True])
def test_is_what_a_loop_records_that_records_everything(name: str, attached: bool) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=20, **RUNS[name])
    found = recorded(model, pruner, range(20), attached=attached)
    rows = pruner.history.rows()
    shares = [[row.pop("macs_pruned", 0.0) for row in table] for table in (rows, found)]
    assert rows == found
    assert shares[0] == pytest.approx(shares[1])
    history = pruner.history
    assert history.sparsity["overall"][-1] == pruner.sparsity()
    assert history.pruned[-1] == pytest.approx(pruner.report().pruned)
    assert bool(history.thresholds) == (name in WITH_THRESHOLDS)
    assert history.sparsity["shared"][-1] > 0.2  # something happened
    assert history.count == ("macs" if name == "macs" else "weights")


def simulated(pruner: Pruner, steps: int) -> list[tuple[int, float]]:
    """Steps without training, in which the threshold of the first layer says what step it is."""
    recorder, controller = pruner.recorder, pruner.controller
    for step in range(1, steps + 1):
        controller.level.fill_(step + recorder.start)
        if recorder.due(step) or step == steps:
            recorder.record(step, pruner.layers, controller, pruner.weighting)
    history = pruner.history
    largest = [pair[1] for pair in history.thresholds["shared"]]
    return list(zip(history.steps, largest, strict=True))


@given(runs=st.lists(st.integers(1, 900), min_size=1, max_size=4))
def test_bounded_and_evenly_spaced(runs: list[int]) -> None:
    pruner = prepare(TwoTasks(), total_steps=runs[0])
    size, before = pruner.recorder.rows.nbytes, 0
    for steps in runs:
        found = simulated(pruner, steps)
        taken = [step for step, _ in found]
        assert found == [(step, step) for step in taken]  # each row is that of its step
        before += steps
        assert taken[-1] == before
        assert 1 <= len(taken) <= 256
        assert taken == sorted(set(taken))
        # No gap is wider than those that thinning makes, and the first run is there too.
        interval = pruner.recorder.interval
        gaps = [b - a for a, b in zip([0, *taken], taken, strict=False)]
        assert max(gaps) <= 2 * interval
        assert interval <= max(1, 4 * before // 256)
        pruner.recorder.start += steps
    assert pruner.recorder.rows.nbytes == size
    assert len(pruner.history) >= 128 or before < 256


def test_every_second_row_is_dropped_and_the_last_one_stays() -> None:
    pruner = prepare(TwoTasks(), total_steps=256)
    simulated(pruner, 256)
    assert pruner.history.steps == list(range(1, 257))
    pruner.recorder.start += 256
    simulated(pruner, 256)
    assert pruner.history.steps == list(range(2, 513, 2))


def test_another_target_goes_on() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=10)
    found = recorded(model, pruner, range(10))
    pruner.retarget(0.9, total_steps=10)
    assert pruner.history.rows() == found
    found += recorded(model, pruner, range(10, 20))
    assert pruner.history.rows() == found
    assert pruner.history.target_sparsity == 0.9


def test_an_early_end_is_a_row() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=600)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(8))
    assert pruner.history.steps == [3, 6]
    pruner.fix_zeros()
    pruner.fix_zeros()
    assert pruner.history.steps == [3, 6, 8]
    assert pruner.history.sparsity["overall"][-1] == round(0.8 * 168) / 168
    pruner.retarget(0.9, total_steps=600)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(8))
    assert pruner.history.steps == [3, 6, 8, 11, 14]
    fresh = prepare(TwoTasks())
    fresh.fix_zeros()
    assert fresh.history.steps == [0]


@METHODS
def test_nothing_is_copied_to_the_device_while_recording(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is made from numbers of the host is copied, and the copy waits."""
    model = TwoTasks()
    pruner = prepare(model, **RUNS[name])
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(8))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("made from numbers of the host")

    for made in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, made, refuse)
    monkeypatch.setattr(Tensor, "new_tensor", refuse)
    count = len(pruner.history)
    pruner.recorder.start += 1
    with refused():
        pruner._record()
    assert len(pruner.history) == count + 1


@METHODS
@pytest.mark.parametrize("stop", [7, 300])
def test_a_loaded_run_has_the_same_history(name: str, stop: int) -> None:
    total = 400 if stop == 300 else 20
    model = TwoTasks()
    fresh = copy.deepcopy(model)
    pruner = prepare(model, total_steps=total, **RUNS[name])
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(stop))
    state = copy.deepcopy(model.state_dict())
    other = prepare(fresh, total_steps=total, **RUNS[name])
    fresh.load_state_dict(state)
    assert other.history == pruner.history
    assert other.postfix() == pruner.postfix()
    again = torch.optim.SGD(other.param_groups(lr=0.1))
    for net, handle, optim in ((model, pruner, optimizer), (fresh, other, again)):
        train(net, handle, optim, range(stop, total))
        assert len(net.state_dict()["adapmtl._extra_state"]) == len(state["adapmtl._extra_state"])
    assert other.history == pruner.history
    assert other.history.steps[-1] == total


def test_an_average_copies_the_rows() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(9))
    average = copy.deepcopy(model)
    average.adapmtl.load_state_dict(pruner.state_dict())
    assert average.adapmtl.history == pruner.history
    assert not model.state_dict()["adapmtl.recorder.rows"].is_floating_point()


@pytest.mark.filterwarnings("ignore:.*task")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_have_their_own_and_the_end_leaves_it(duplicate: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(19))
    before = pruner.history
    twin = duplicate(model)
    assert twin.adapmtl.history == before
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), [19])
    assert len(pruner.history) == len(before) + 1 == len(twin.adapmtl.history) + 1
    after = pruner.history
    pruner.finalize()
    assert pruner.history == after
    assert pruner.postfix()["sparsity"] == "79.8% of 80.0%"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_precision(dtype: torch.dtype) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    before = pruner.history
    model.to(dtype)
    assert pruner.history == before


def test_a_layer_that_is_lost_is_told_by_the_next_update_and_not_by_the_history() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=450)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(4))
    del model.body.weight
    pruner.step()
    pruner.step()
    assert pruner.history.steps == [2, 4]


def test_a_loop_without_losses_and_losses_that_are_not_finite() -> None:
    pruner = prepare(TwoTasks())
    pruner.step()
    assert pruner.history.losses == {"a": [None], "b": [None]}
    given = {"a": torch.tensor(float("nan"), requires_grad=True), "b": torch.ones(())}
    pruner.loss(given)
    pruner._record()
    assert pruner.history.losses == {"a": [None], "b": [1.0]}
    assert "loss/a" not in pruner.history.rows()[0]


def test_the_postfix_after_zeros_are_fixed_early() -> None:
    """The row of the last step is replaced."""
    pruner = prepare(TwoTasks(), total_steps=100, target_sparsity=0.8)
    for _ in range(10):
        pruner.step()
    before = pruner.postfix()
    pruner.fix_zeros()
    assert before["sparsity"] != pruner.postfix()["sparsity"] == "79.8% of 80.0%"


def test_the_postfix_waits_only_for_new_rows() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=600)
    assert pruner.postfix() == {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 10):
        train(model, pruner, optimizer, [step])
        if step % 3:
            with refused():
                pruner.postfix()
        elif step:
            with pytest.raises(AssertionError), refused():
                pruner.postfix()
        shown = pruner.postfix()
    assert shown == {"sparsity": "0.0% of 80.0%", "weights": "a 1.00, b 1.00"}
    shown.clear()  # the caller's own
    assert pruner.postfix()


def example(count: int) -> History:
    return History(
        steps=[10 * (i + 1) for i in range(count)],
        sparsity={name: [i / count for i in range(count)] for name in ("shared", "overall")},
        pruned=[i / count for i in range(count)],
        thresholds={"shared": [(0.1, 0.2)] * count},
        task_weights={"seg": [1.25] * count},
        losses={"seg": [None if i % 2 else 0.5 for i in range(count)]},
        target_sparsity=0.9,
    )


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 256])
def test_reads_well(count: int) -> None:
    history = example(count)
    lines = str(history).splitlines()
    assert len(lines) == (min(count, 6) + 2 if count else 1)
    if not count:
        assert lines == ["History(no rows)"]
        return
    assert lines[0].split() == ["step", "shared", "overall", "weight", "seg", "loss", "seg"]
    assert int(lines[-2].split()[0].replace(",", "")) == history.steps[-1]
    assert lines[-1] == repr(history) == f"History({count} rows, steps 10 to {10 * count})"
    assert len(repr(history)) < 80
    assert [row[0] for row in tables_of(history)[0]] == [line.split()[0] for line in lines[:-1]]


def test_json_gives_it_back() -> None:
    history = example(7)
    text = json.dumps(history.to_dict(), allow_nan=False)
    assert History(**json.loads(text)) == history
    assert pickle.loads(pickle.dumps(history)) == history
