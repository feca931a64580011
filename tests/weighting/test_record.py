"""The losses of a run: checked, stacked, counted, and what is read from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Row, assert_refused, loss, rows, running
from torch import Tensor
from toys import TwoTasks, losses, prepare
from untouched import assert_untouched
from weightings import as_losses, feed

from torch_adapmtl import (
    SNIP,
    DiSparse,
    EqualWeighting,
    StabilityWeighting,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_stays_out_of_the_window_and_is_named(value: float) -> None:
    rows = [[1.0, 2.0], [1.5, 2.1], [1.2, 2.3]]
    clean = feed(StabilityWeighting(["t0", "t1"], window=4, start=0), rows)
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=0)
    feed(weighting, rows[:2])
    total = weighting(as_losses([value, None]))
    assert not math.isfinite(total.item())  # a gradient scaler must see it
    feed(weighting, rows[2:])
    assert torch.equal(weighting.history, clean.history)
    assert torch.equal(weighting.weights(), clean.weights())
    with pytest.raises(RuntimeError, match=r"NaN or infinite loss of the tasks 't0' \(1x\)\."):
        weighting.check_finite()
    weighting.check_finite()  # it was said once


def test_check_finite_counts_every_task() -> None:
    weighting = EqualWeighting(["a", "b", "c"])
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    weighting({"a": nan, "b": one, "c": nan})
    weighting({"a": one, "b": None, "c": nan})
    with pytest.raises(RuntimeError, match=r"'a' \(1x\), 'c' \(2x\)"):
        weighting.check_finite()


def test_strict_raises_at_once_and_remembers_nothing() -> None:
    weighting = StabilityWeighting(["a", "b"], window=4, start=0, strict=True)
    with pytest.raises(RuntimeError, match=r"of the tasks 'b'"):
        weighting({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)})
    assert weighting.steps == 0
    weighting.check_finite()
    assert weighting({"a": torch.tensor(1.0)}) == 1


def test_a_loss_beyond_float32_is_finite() -> None:
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=0)
    feed(weighting, [[1e300, 1.0], [-1e300, 2.0], [1e300, 1.0]])
    weighting.check_finite()
    assert weighting.counts.tolist() == [3, 3]
    assert torch.isfinite(weighting.weights()).all()


V, T, R = ValueError, TypeError, RuntimeError
DETACHED = "not detached or made anew"
TABLE = [
    running("a vector", loss(a=lambda real: real.expand(3)), V, "losses['a']", "(3,)", ".mean()"),
    running("a vector of one", loss(a=lambda real: real.view(1)), V, "losses['a']", "(1,)",
            ".mean()"),
    running("a float", loss(a=1.0), T, "losses['a']", "got float", "not loss.item()"),
    running("an integer", loss(a=torch.tensor(1)), T, "losses['a']", "torch.int64", ".float()"),
    running("a complex loss", loss(a=lambda real: real * 1j), T, "losses['a']", "torch.complex64",
            "cast it"),
    running("an unknown task", loss(c=lambda _: torch.tensor(1.0)), V, "losses", "['c']",
            "the tasks are ['a', 'b']"),
    running("no loss", loss(), V, "losses", "got {}", "at least one of the tasks ['a', 'b']"),
    running("only None", loss(a=None, b=None), V, "losses", "'a': None", "at least one of"),
    running("a list", lambda s: s.pruner.loss(list(losses(s.model, 0).values())), T, "losses",
            "got a list", "name each loss by its task"),
    running("the sum", lambda s: s.pruner.loss(sum(losses(s.model, 0).values())), T, "losses",
            "got a Tensor", "name each loss by its task"),
    running("detached losses", loss(a=Tensor.detach, b=Tensor.detach), V, "losses",
            "['a', 'b']", DETACHED),
    running("made anew", loss(a=lambda real: torch.tensor(1.0)), V, "losses", "['a']", DETACHED),
    *(
        running(f"{name} for {method}", do, V, "losses", found, remedy, after=0,
                options={"method": method})
        for method in (SNIP(), DiSparse())
        for name, do, found, remedy in (
            ("a vector", loss(a=lambda real: real.expand(3)), "(3,)", ".mean()"),
            ("detached losses", loss(a=Tensor.detach), "['a']", DETACHED),
        )
    ),
    *(
        running(f"a loss of {value}", lambda s: s.pruner.step(), R, "'b' (1x)",
                "NaN or infinite loss", "look at how this loss is computed",
                first=loss(a=lambda real: real, b=lambda real, v=value: real * v),
                ignored=("nonfinite", "_losses_since_step"))
        for value in (math.nan, math.inf)
    ),
    running("a loss of NaN, strict", loss(a=lambda real: real, b=lambda real: real * math.nan), R,
            "'b'", "NaN or infinite loss", "look at how this loss is computed",
            options={"weighting": EqualWeighting(["a", "b"], strict=True)}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:no weight is left")  # SNIP, of a dozen weights
@rows(TABLE)
def test_refused(row: Row) -> None:
    assert_refused(row)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_losses_with_a_shape_are_refused(shape: list[int]) -> None:
    do = loss(a=lambda real: real.expand(shape))
    found = str(tuple(shape))
    assert_refused(Row("", do, V, "losses['a']", found, ".mean()", after=0, goes_on=False))


@pytest.mark.parametrize("method", ["adaptive", SNIP(), DiSparse()])
def test_losses_to_look_at(method: Any) -> None:
    """In evaluation a loss need not require grad, and it leaves no trace."""
    model = TwoTasks()
    pruner = prepare(model, method=method)

    def look() -> None:
        with torch.no_grad():
            pruner.loss(losses(model, 0))
        with torch.inference_mode():
            pruner.loss(losses(model, 0))
        model.eval()
        pruner.loss({task: loss.detach() for task, loss in losses(model, 0).items()})
        model.train()

    assert_untouched(model, look)


@given(
    st.lists(
        st.lists(
            st.one_of(st.none(), st.floats(0.1, 9), st.sampled_from([0.0, math.nan])),
            min_size=2,
            max_size=2,
        ),
        max_size=12,
    )
)
def test_the_trace_is_that_of_a_plain_one(steps: list[list[float | None]]) -> None:
    """The first loss and the exponential average, of what is there, finite and not 0."""
    weighting = EqualWeighting(["a", "b"])
    averages: dict[str, list[float]] = {"a": [], "b": []}
    first: dict[str, float] = {}
    for step in steps:
        here = {task: value for task, value in zip("ab", step, strict=True) if value is not None}
        if not here:
            continue
        weighting({task: torch.tensor(value) for task, value in here.items()})
        weighting.record.read()
        for task, value in here.items():
            if math.isfinite(value) and value:
                first.setdefault(task, value)
                before = averages[task][-1] if averages[task] else value
                averages[task].append(0.8 * before + 0.2 * value)
    courses = weighting.record.courses()
    assert list(courses) == [task for task in "ab" if averages[task]]
    for task, course in courses.items():
        expected = (first[task], min(averages[task]), max(averages[task]), averages[task][-1])
        assert course == pytest.approx(expected, rel=1e-5)


def test_a_reading_has_what_came_since_the_last() -> None:
    """Readings are rarer than steps: tasks that take turns are all read, and no loss twice."""
    weighting = EqualWeighting(["a", "b", "c"])
    for step in range(5 + 12):  # each of the first five is a reading
        weighting({"abc"[step % 3]: torch.tensor(1.0 + step)})
        if step % 6 == 4:  # always after a "b"
            weighting.record.read()
    assert weighting.record.course[4].tolist() == [2 + 2, 2 + 2, 1 + 2]
    weighting.record.read()
    assert weighting.record.course[4].tolist() == [2 + 2, 2 + 2, 1 + 2]
    courses = weighting.record.courses()
    assert [course.first for course in courses.values()] == [1, 2, 3]
    assert courses["c"].last == pytest.approx(3 * 0.64 + 9 * 0.16 + 15 * 0.2)


def test_a_record_that_was_loaded_goes_on_reading_as_it_would_have() -> None:
    whole, half = (EqualWeighting(["a"]) for _ in range(2))
    for step in range(9):
        whole({"a": torch.tensor(1.0 + step)})
    for step in range(3):
        half({"a": torch.tensor(1.0 + step)})
    again = EqualWeighting(["a"])
    again.load_state_dict(half.state_dict())
    again.record.forget()  # as the pruner does
    for step in range(3, 9):
        again({"a": torch.tensor(1.0 + step)})
    assert torch.equal(again.record.course, whole.record.course)
    assert torch.equal(again.record.latest, whole.record.latest)
