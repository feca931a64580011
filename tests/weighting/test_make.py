"""A weighting from a short description."""

from __future__ import annotations

from typing import Any

import pytest
from refusals import Error, Row, assert_refused, option, raises, rows
from weightings import inverse

from torch_adapmtl import (
    CallableWeighting,
    EqualWeighting,
    StabilityWeighting,
)
from torch_adapmtl.weighting._make import make_weighting


@pytest.mark.parametrize(
    ("total_steps", "window", "start"), [(20_000, 500, 5_000), (100_000, 500, 25_000), (1, 10, 0)]
)
def test_make_stability(total_steps: int, window: int, start: int) -> None:
    for spec, direction in (("stability", "stable"), ("deviation", "deviating")):
        weighting = make_weighting(spec, ["a", "b"], total_steps)
        assert isinstance(weighting, StabilityWeighting)
        assert (weighting.window, weighting.start) == (window, start)
        assert weighting.direction == direction
        assert weighting.deviation == "relative_change"
        assert weighting.bounds == (0.5, 1.5)


def test_make_the_others() -> None:
    assert isinstance(make_weighting("equal", ["a"], 10), EqualWeighting)
    fixed = make_weighting({"a": 1, "b": 3}, ["a", "b"], 10)
    assert fixed.as_dict() == {"a": 0.5, "b": 1.5}
    assert isinstance(make_weighting(inverse, ["a"], 10), CallableWeighting)
    given = EqualWeighting(["b", "a"])
    assert make_weighting(given, ["a", "b"], 10) is given


def test_repr_shows_the_settings() -> None:
    text = repr(StabilityWeighting(["a"], window=3, start=7))
    assert "window=3, start=7, direction='stable'" in text


@pytest.mark.parametrize(
    ("spec", "steps", "error", "named", "found", "remedy"),
    [
        ("stabel", 10, ValueError, "weighting", "'stabel'", "'stability'"),
        (EqualWeighting, 10, TypeError, "weighting", "class", "LossWeighting instance"),
        ("equal", 0, ValueError, "total_steps", "got 0", "integer >= 1"),
    ],
    ids=str,
)
def test_refused_by_make(
    spec: Any, steps: int, error: Error, named: str, found: str, remedy: str
) -> None:
    raises(lambda: make_weighting(spec, ["a"], steps), error, named, found, remedy)


V, T = ValueError, TypeError
TABLE = [
    option("weighting", V, "weighting", "'gradnorm'", "one of 'stability'", weighting="gradnorm"),
    option("weighting, a number", T, "weighting", "got 3", "'equal', a mapping", weighting=3),
    option("a weighting without a task", V, "weights", "missing ['b']", "exactly the tasks",
           weighting={"a": 1.0}),
    option("a weighting of an unknown task", V, "weights", "unknown ['c']", "exactly the tasks",
           weighting={"a": 1.0, "b": 1.0, "c": 1.0}),
    option("a weighting of other tasks", V, "weighting", "['x']", "make it for these",
           weighting=EqualWeighting(["x"])),
]  # fmt: skip


@rows(TABLE)
def test_refused_by_the_call(row: Row) -> None:
    assert_refused(row)
