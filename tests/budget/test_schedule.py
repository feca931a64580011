"""The schedule: a pure function of the step, and what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Error, raises

from torch_adapmtl import SparsitySchedule

NAN, INF = math.nan, math.inf
V, T = ValueError, TypeError
IN_ORDER = "0 <= start <= end <= 1"


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"start": 0.7, "end": 0.6}, V, "start and end", "start=0.7, end=0.6", IN_ORDER),
        ({"start": -0.1}, V, "start and end", "start=-0.1", IN_ORDER),
        ({"end": 1.5}, V, "start and end", "end=1.5", IN_ORDER),
        ({"end": NAN}, V, "start and end", "end=nan", IN_ORDER),
        ({"start": "soon"}, T, "start", "'soon'", "be a number"),
        ({"end": "soon"}, T, "end", "'soon'", "be a number"),
        ({"start": None}, T, "start", "None", "be a number"),
        ({"start": 0.6}, V, "start and end", "start=0.6, end=0.5", IN_ORDER),
        ({"fix_at": 0.4}, V, "fix_at", "got 0.4", "between end=0.5 and 1"),
        ({"fix_at": NAN}, V, "fix_at", "got nan", "between end=0.5 and 1"),
        ({"fix_at": True}, T, "fix_at", "True", "be a number"),
        ({"regrow_until": 0.4}, V, "regrow_until", "got 0.4", "between end=0.5 and fix_at=0.9"),
        (
            {"fix_at": 0.7, "regrow_until": 0.8},
            V,
            "regrow_until",
            "got 0.8",
            "end=0.5 and fix_at=0.7",
        ),
        ({"regrow_until": NAN}, V, "regrow_until", "got nan", "between end=0.5"),
        ({"regrow_until": True}, T, "regrow_until", "True", "be a number"),
        ({"initial": 1.0}, V, "initial", "got 1.0", "in [0, 1)"),
        ({"initial": -0.2}, V, "initial", "got -0.2", "in [0, 1)"),
        ({"initial": torch.tensor(0.1)}, T, "initial", "tensor(0.1", "be a number"),
        ({"shape": "sigmoid"}, V, "shape", "'sigmoid'", "'cubic', 'linear', 'cosine'"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: SparsitySchedule(**options), error, f"schedule: {named}", found, remedy)


FRACTIONS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, NAN, INF]), st.floats(-0.5, 1.5))
TIMES = st.none() | FRACTIONS


@given(start=FRACTIONS, end=FRACTIONS, fix_at=TIMES, regrow_until=TIMES, initial=FRACTIONS)
def test_is_in_order_or_refused(
    start: float, end: float, fix_at: float | None, regrow_until: float | None, initial: float
) -> None:
    ordered = 0 <= start <= end <= 1
    fixes = fix_at is None or end <= fix_at <= 1
    last = max(end, 0.9) if fix_at is None else fix_at
    regrows = regrow_until is None or end <= regrow_until <= last
    options: Any = {
        "start": start, "end": end, "fix_at": fix_at, "regrow_until": regrow_until,
        "initial": initial,
    }  # fmt: skip
    if not (ordered and fixes and regrows and 0 <= initial < 1):
        wrong = (
            "start and end" if not ordered else "fix_at" if not fixes
            else "regrow_until" if not regrows else "initial"
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"schedule: {wrong} must "):
            SparsitySchedule(**options)
        return
    schedule = SparsitySchedule(**options)
    assert schedule.fix_at is not None
    assert schedule.regrow_until is not None
    assert end <= schedule.regrow_until <= schedule.fix_at == last <= 1
    assert end * 100 <= schedule.fix_step(100) <= 100
    learning = [schedule.regrows(step, 100, 0.99) for step in range(101)]
    assert learning == sorted(learning, reverse=True)
    assert abs(sum(learning) - 100 * schedule.regrow_until) <= 1


@given(
    start=st.floats(0, 0.5),
    fix_at=st.none() | st.floats(0.5, 1),
    target=st.floats(0, 1, exclude_max=True),
    total=st.integers(1, 200),
)
def test_an_end_that_is_not_given_depends_on_the_target_only_above_95_percent(
    start: float, fix_at: float | None, target: float, total: int
) -> None:
    schedule = SparsitySchedule(start=start, fix_at=fix_at)
    percent = max(0.0, 100 * target - 95)
    end = max(start, 0.5 - 0.05 * percent)
    assert schedule.end_at(target) == pytest.approx(end)
    given_end = SparsitySchedule(start=start, end=schedule.end_at(target), fix_at=fix_at)
    assert schedule.fix_at == given_end.fix_at
    for step in range(total + 1):
        assert schedule(step, total, target) == given_end(step, total, target)
        assert schedule.regrows(step, total, target) == given_end.regrows(step, total, target)


def test_an_end_that_is_given_holds_for_every_target() -> None:
    assert SparsitySchedule(end=0.5).end_at(0.99) == 0.5


SHAPES = {
    "cubic": lambda p: (1 - p) ** 3,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
}


@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    shape=st.sampled_from(list(SHAPES)),
    target=st.floats(0, 0.99),
    initial=st.floats(0, 0.99),
    total=st.integers(1, 200),
)
def test_is_the_formula(
    ends: list[float], shape: Any, target: float, initial: float, total: int
) -> None:
    start, end = ends
    schedule = SparsitySchedule(start=start, end=end, shape=shape)
    for step in range(total + 1):
        found = schedule(step, total, target, initial)
        at = step / total
        if step == total or at >= end:
            assert found == pytest.approx(target)
        elif at <= start:
            assert found == pytest.approx(initial)
        else:
            share = SHAPES[shape]((at - start) / (end - start))
            assert found == pytest.approx(target + (initial - target) * share, abs=1e-6)


def test_its_own_initial_sparsity_never_exceeds_the_target() -> None:
    schedule = SparsitySchedule(start=0.5, initial=0.4)
    assert schedule(1, 100, 0.9) == 0.4
    assert schedule(1, 100, 0.2) == 0.2


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    schedule = SparsitySchedule(
        start=kind(0.25), end=kind(0.5), fix_at=kind(1), regrow_until=kind(1), initial=kind(0)
    )
    assert schedule == SparsitySchedule(start=0.25, end=0.5, fix_at=1.0, regrow_until=1.0)
    assert repr(schedule) == repr(
        SparsitySchedule(start=0.25, end=0.5, fix_at=1.0, regrow_until=1.0)
    )


def test_equal_schedules_say_the_same() -> None:
    whole, fractions = SparsitySchedule(start=0, end=1), SparsitySchedule(start=0.0, end=1.0)
    assert whole == fractions
    assert repr(whole) == repr(fractions)


@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    initial=st.floats(0, 1, exclude_max=True),
    target=st.floats(0, 1, exclude_max=True),
    shape=st.sampled_from(["cubic", "linear", "cosine"]),
    total=st.integers(1, 60),
)
def test_schedule_never_falls_and_ends_at_the_target(
    ends: list[float], initial: float, target: float, shape: Any, total: int
) -> None:
    schedule = SparsitySchedule(start=ends[0], end=ends[1], initial=initial, shape=shape)
    values = [schedule(step, total, target) for step in range(total + 1)]
    assert values[-1] == target
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(values))
    assert all(0 <= value <= target + 1e-12 for value in values)


def test_times_that_follow_from_numbers_of_numpy_are_the_same() -> None:
    assert SparsitySchedule(end=np.float32(0.5)) == SparsitySchedule(end=0.5)
