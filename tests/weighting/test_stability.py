"""Stability weighting: what enters the windows, which weights follow, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Error, raises
from torch import Tensor
from weightings import as_losses, feed

from torch_adapmtl import (
    StabilityWeighting,
)


class Oracle:
    """Stability weighting with lists and floats, written from its description."""

    def __init__(self, count: int, **settings: Any) -> None:
        self.windows: list[list[float]] = [[] for _ in range(count)]
        self.steps = 0
        self.__dict__.update(settings)

    def observe(self, row: list[float | None]) -> None:
        self.steps += 1
        for window, value in zip(self.windows, row, strict=True):
            if value and math.isfinite(value):  # None: no loss; 0: no label
                window.append(value)
                del window[: -self.window]

    def deviation_of(self, losses: list[float]) -> float:
        if self.deviation == "relative_change":
            changes = [
                min(abs(after - before) / abs(after), 1e6)
                for before, after in itertools.pairwise(losses)
            ]
            return sum(changes) / len(changes)
        mean = sum(losses) / len(losses)
        std = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))
        if std == 0:
            return 0.0
        return min(std / abs(mean), 1e6) if mean else 1e6

    def weights(self) -> list[float]:
        weights = [1.0] * len(self.windows)
        ready = [i for i, window in enumerate(self.windows) if len(window) >= 2]
        if self.steps > self.start:
            deviations = {i: max(self.deviation_of(self.windows[i]), 1e-6) for i in ready}
            raw = {i: 1 / d if self.direction == "stable" else d for i, d in deviations.items()}
            for i in ready:
                weights[i] = raw[i] / sum(raw.values()) * len(ready)
        if self.bounds is None:
            return weights
        lower, upper = self.bounds
        factor = 1.0
        for weight in weights:
            if 1 + factor * (weight - 1) > upper:
                factor = (upper - 1) / (weight - 1)
            if 1 + factor * (weight - 1) < lower:
                factor = (1 - lower) / (1 - weight)
        return [1 + factor * (weight - 1) for weight in weights]


losses_of_any_size = st.one_of(
    st.none(),
    st.floats(0.01, 100),
    st.floats(1e-30, 1e30),
    st.sampled_from([0.0, 1.0, -2.5, math.nan, math.inf, -math.inf]),
)
ordinary_losses = st.floats(0.1, 10).map(lambda x: float(torch.tensor(x)))  # float32 values
settings_of_stability = st.fixed_dictionaries(
    {
        "window": st.integers(2, 6),
        "start": st.integers(0, 4),
        "direction": st.sampled_from(["stable", "deviating"]),
        "deviation": st.sampled_from(["relative_change", "coefficient_of_variation"]),
        "bounds": st.sampled_from([None, (0.5, 1.5), (0.0, 2.0), (0.8, 1.0), (0.9, 3.0)]),
    }
)


@st.composite
def histories(draw: st.DrawFn, losses: st.SearchStrategy[Any]) -> list[list[float | None]]:
    count = draw(st.integers(1, 4))
    row = st.lists(losses, min_size=count, max_size=count)
    return draw(st.lists(row, min_size=1, max_size=12))


@given(
    rows=histories(st.one_of(st.none(), ordinary_losses, st.sampled_from([math.nan, 0.0]))),
    settings=settings_of_stability,
)
def test_stability_agrees_with_the_oracle_after_every_step(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    count = len(rows[0])
    weighting = StabilityWeighting([f"t{i}" for i in range(count)], **settings)
    oracle = Oracle(count, **settings)
    for row in rows:
        if all(value is None for value in row):
            continue
        total = weighting(as_losses(row))
        oracle.observe(row)
        expected = torch.tensor(oracle.weights())
        torch.testing.assert_close(weighting.weights(), expected, rtol=2e-4, atol=2e-4)
        if all(value is None or math.isfinite(value) for value in row):
            summed = sum(w * v for w, v in zip(oracle.weights(), row, strict=True) if v is not None)
            assert total.item() == pytest.approx(summed, rel=1e-3, abs=1e-3)


@given(rows=histories(losses_of_any_size), settings=settings_of_stability)
def test_stability_weights_sum_to_t_within_bounds_whatever_the_losses(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    count = len(rows[0])
    weighting = StabilityWeighting([f"t{i}" for i in range(count)], **settings)
    feed(weighting, rows)
    weights = weighting.weights()
    assert torch.isfinite(weights).all()
    assert weights.sum().item() == pytest.approx(count, rel=1e-5)
    lower, upper = settings["bounds"] or (0.0, count + 1e-5)
    assert ((weights >= lower) & (weights <= upper)).all()


@given(
    rows=histories(ordinary_losses),
    settings=settings_of_stability,
    power=st.integers(-20, 20),
    factor=st.floats(1e-6, 1e6),
)
def test_stability_is_scale_free_per_task(
    rows: list[list[float | None]], settings: dict[str, Any], power: int, factor: float
) -> None:
    def weights_with(scale: float) -> Tensor:
        scaled = [[row[0] * scale, *row[1:]] for row in rows]
        return feed(
            StabilityWeighting([f"t{i}" for i in range(len(rows[0]))], **settings), scaled
        ).weights()

    assert torch.equal(weights_with(1.0), weights_with(2.0**power))
    torch.testing.assert_close(weights_with(1.0), weights_with(factor), rtol=2e-2, atol=2e-3)


@given(rows=histories(losses_of_any_size), settings=settings_of_stability, data=st.data())
def test_stability_does_not_depend_on_the_order_of_tasks(
    rows: list[list[float | None]], settings: dict[str, Any], data: st.DataObject
) -> None:
    tasks = [f"t{i}" for i in range(len(rows[0]))]
    order = data.draw(st.permutations(range(len(tasks))))
    weighting = feed(StabilityWeighting(tasks, **settings), rows)
    permuted = feed(StabilityWeighting([tasks[i] for i in order], **settings), rows)
    torch.testing.assert_close(weighting.weights()[list(order)], permuted.weights())


@given(rows=histories(losses_of_any_size), settings=settings_of_stability)
def test_a_missing_task_leaves_its_window_and_the_other_windows_alone(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    tasks = [f"t{i}" for i in range(len(rows[0]))]
    weighting = feed(StabilityWeighting([*tasks, "rare"], **settings), rows)
    alone = feed(StabilityWeighting(tasks, **settings), rows)
    assert torch.equal(weighting.history[:-1], alone.history)
    assert torch.equal(weighting.counts[:-1], alone.counts)
    assert torch.equal(weighting.steps, alone.steps)
    assert not weighting.history[-1].any()
    assert weighting.counts[-1] == 0


def test_tasks_without_two_losses_keep_weight_1_and_the_others_share_the_rest() -> None:
    rows = [[1.0, 1.0, 5.0], [1.1, 2.0, None], [1.0, 1.0, None]]
    tasks = ["t0", "t1", "t2"]
    weights = feed(StabilityWeighting(tasks, window=3, start=0, bounds=None), rows).weights()
    pair = feed(
        StabilityWeighting(tasks[:2], window=3, start=0, bounds=None), [row[:2] for row in rows]
    ).weights()
    assert weights[2] == 1
    torch.testing.assert_close(weights[:2], pair)


def test_directions_of_text_and_code() -> None:
    rows = [[1.0 + 0.01 * (i % 2), 1.0 + i % 2] for i in range(10)]
    text = feed(StabilityWeighting(["t0", "t1"], window=8, start=0), rows).as_dict()
    code = feed(
        StabilityWeighting(["t0", "t1"], window=8, start=0, direction="deviating"), rows
    ).as_dict()
    assert text == {"t0": 1.5, "t1": 0.5}
    assert code == {"t0": 0.5, "t1": 1.5}


def test_first_steps_weigh_equally_while_windows_fill() -> None:
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=3)
    rows = [[1.0, 1.0], [1.1, 2.0], [1.0, 1.0], [1.1, 2.0]]
    for row in rows[:3]:
        weighting(as_losses(row))
        assert weighting.as_dict() == {"t0": 1.0, "t1": 1.0}
    weighting(as_losses(rows[3]))
    assert weighting.as_dict() == {"t0": 1.5, "t1": 0.5}
    assert weighting.counts.tolist() == [4, 4]


@pytest.mark.parametrize("direction", ["stable", "deviating"])
@pytest.mark.parametrize("deviation", ["relative_change", "coefficient_of_variation"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-45, 1e38, 1e300])
def test_constant_losses_weigh_equally(direction: Any, deviation: Any, value: float) -> None:
    weighting = StabilityWeighting(
        ["t0", "t1"], window=7, start=0, direction=direction, deviation=deviation, bounds=None
    )
    feed(weighting, [[value, value]] * 9)
    assert weighting.as_dict() == {"t0": 1.0, "t1": 1.0}


def test_one_flat_loss_takes_no_more_than_its_bound() -> None:
    rows = [[1.0, 2.0 + i % 2, 3.0 + i % 3] for i in range(9)]
    tasks = ["t0", "t1", "t2"]
    free = feed(StabilityWeighting(tasks, window=7, start=0, bounds=None), rows).as_dict()
    bound = feed(StabilityWeighting(tasks, window=7, start=0), rows).as_dict()
    assert free["t0"] > 2.99
    assert bound["t0"] == 1.5
    assert sum(bound.values()) == pytest.approx(3)


def test_a_single_task_always_has_weight_1() -> None:
    weighting = StabilityWeighting(["t0"], window=3, start=0, bounds=None)
    assert feed(weighting, [[float(i)] for i in range(6)]).as_dict() == {"t0": 1.0}


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"window": 1}, ValueError, "window", "got 1", "integer >= 2"),
        ({"window": 2.5}, ValueError, "window", "got 2.5", "integer >= 2"),
        ({"start": -1}, ValueError, "start", "got -1", "integer >= 0"),
        ({"start": True}, ValueError, "start", "got True", "integer >= 0"),
        ({"direction": "calm"}, ValueError, "direction", "'calm'", "one of 'stable'"),
        ({"deviation": "std"}, ValueError, "deviation", "'std'", "one of 'relative_change'"),
        ({"bounds": (1.1, 2)}, ValueError, "bounds", "got (1.1, 2)", "lower <= 1 <= upper"),
        ({"bounds": (0.5, math.nan)}, ValueError, "bounds", "got (0.5, nan)", "None"),
        ({"bounds": (0.5,)}, TypeError, "bounds", "got (0.5,)", "a pair"),
        ({"bounds": 2}, TypeError, "bounds", "got 2", "a pair"),
        ({"bounds": (0, "high")}, TypeError, "bounds: upper", "'high'", "be a number"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    settings: Any = {"window": 2, "start": 0, **options}
    raises(lambda: StabilityWeighting(["a"], **settings), error, named, found, remedy)


ANYTHING = st.one_of(st.none(), st.booleans(), st.text(), st.complex_numbers(), st.just([0.5]))
BOUND = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf]), st.floats(-0.5, 1.5))


@given(
    window=st.integers(-3, 40) | ANYTHING,
    start=st.integers(-3, 40) | ANYTHING,
    bounds=st.none() | st.tuples(BOUND, BOUND) | st.lists(BOUND, max_size=3) | ANYTHING,
)
def test_windows_and_bounds_are_taken_or_refused(window: Any, start: Any, bounds: Any) -> None:
    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    fine = bounds is None or (pair and 0 <= bounds[0] <= 1 <= bounds[1] < math.inf)
    if whole(window, 2) and whole(start, 0) and fine:
        weights = StabilityWeighting(["a", "b"], window=window, start=start, bounds=bounds)
        assert weights.as_dict() == {"a": 1.0, "b": 1.0}
        return
    wrong = "window" if not whole(window, 2) else "start" if not whole(start, 0) else "bounds"
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^{wrong} must .*got"):
        StabilityWeighting(["a", "b"], window=window, start=start, bounds=bounds)


@given(settings_of_stability, st.data())
def test_the_config_differs_when_a_setting_does(
    settings: dict[str, Any], data: st.DataObject
) -> None:
    weighting = StabilityWeighting(["a"], **settings)
    config = weighting.config()
    assert json.loads(json.dumps(config)) == config
    assert StabilityWeighting(["a"], strict=True, **settings).config() == config
    name = data.draw(st.sampled_from(sorted(settings)))
    other = {**settings, name: data.draw(settings_of_stability)[name]}
    assert (StabilityWeighting(["a"], **other).config() == config) == (other == settings)
