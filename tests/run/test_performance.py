"""Delta_T against the published figures."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_adapmtl import relative_performance

TABLE = Path(__file__).parents[1] / "fixtures" / "nyuv2_mobilenetv2.csv"
METRICS = {
    "seg": ["miou", "pixel_acc"],
    "normal": ["angle_mean", "angle_median", "within_11_25", "within_22_5", "within_30"],
    "depth": ["abs_err", "rel_err", "delta_1_25", "delta_1_25_2", "delta_1_25_3"],
}
LOWER = ["angle_mean", "angle_median", "abs_err", "rel_err"]


def published() -> dict[str, dict[str, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return {row["model"]: row for row in csv.DictReader(lines)}


def metrics_of(row: dict[str, str]) -> dict[str, dict[str, float]]:
    return {task: {name: float(row[name]) for name in names} for task, names in METRICS.items()}


@pytest.mark.parametrize("model", list(published()))
def test_published_deltas_to_two_decimals(model: str) -> None:
    rows = published()
    found = relative_performance(
        metrics_of(rows[model]), metrics_of(rows["dense"]), lower_is_better=LOWER
    )
    assert found.delta == pytest.approx(float(rows[model]["delta_T"]), abs=0.00501)
    for task, delta in found.tasks.items():
        assert delta == pytest.approx(float(rows[model][f"delta_{task}"]), abs=0.00501)
        assert delta == pytest.approx(sum(found.metrics[task].values()))


def test_published_table_is_whole() -> None:
    assert len(published()) == 7


def test_equal_names_in_two_tasks_can_be_told_apart() -> None:
    found = relative_performance(
        {"a": {"error": 2.0}, "b": {"error": 2.0}},
        {"a": {"error": 1.0}, "b": {"error": 1.0}},
        lower_is_better=[("a", "error")],
    )
    assert found.tasks == {"a": -100, "b": 100}
    assert found.delta == 0
    assert str(found).splitlines()[-1] == "overall     +0.00 %"


def test_more_of_a_negative_baseline_is_better() -> None:
    found = relative_performance(
        {"a": {"loglik": -1.0}}, {"a": {"loglik": -2.0}}, lower_is_better=()
    )
    assert found.delta == 50


values = st.floats(0.01, 100)


@given(st.lists(st.tuples(values, values, st.booleans()), min_size=1, max_size=6), values)
def test_relative_performance_has_no_unit(
    rows: list[tuple[float, float, bool]], scale: float
) -> None:
    lower = [(f"t{i}", "m") for i, row in enumerate(rows) if row[2]]

    def delta(factor: float) -> float:
        return relative_performance(
            {f"t{i}": {"m": row[0] * factor} for i, row in enumerate(rows)},
            {f"t{i}": {"m": row[1] * factor} for i, row in enumerate(rows)},
            lower_is_better=lower,
        ).delta

    assert delta(scale) == pytest.approx(delta(1.0), rel=1e-6, abs=1e-6)
    plain = [(-1 if low else 1) * (m / b - 1) * 100 for m, b, low in rows]
    assert delta(1.0) == pytest.approx(sum(plain) / len(plain), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("metrics", "baseline", "lower", "error", "match"),
    [
        ({"a": {"m": 1.0}}, {"a": {"m": 0.0}}, (), ValueError, r"baseline\['a'\]\['m'\] is 0"),
        ({"a": {"m": math.nan}}, {"a": {"m": 1.0}}, (), ValueError, r"metrics\['a'\]\['m'\].*nan"),
        ({"a": {"m": 1.0}}, {"a": {"m": math.inf}}, (), ValueError, r"baseline\['a'\].*inf"),
        ({"a": {"m": "x"}}, {"a": {"m": 1.0}}, (), TypeError, "must be a number, got 'x'"),
        (
            {"a": {"m": 1.0}},
            {"a": {"n": 1.0}},
            (),
            ValueError,
            r"task 'a' differ.*\['n'\].*\['m'\]",
        ),
        ({"a": {"m": 1.0}}, {}, (), ValueError, r"tasks differ.*baseline lacks \['a'\]"),
        ({}, {}, (), ValueError, "no tasks"),
        ({"a": {}}, {"a": {}}, (), ValueError, "no metrics of task 'a'"),
        ({"a": 1.0}, {"a": 1.0}, (), TypeError, "metrics must be a mapping.*1.0"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, "m", TypeError, r"pass \['m'\]"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, ["n"], ValueError, r"\['n'\], which no task has"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, [("b", "m")], ValueError, r"which no task has"),
    ],
)
def test_relative_performance_refuses(
    metrics: Any, baseline: Any, lower: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        relative_performance(metrics, baseline, lower_is_better=lower)


def test_values_may_be_tensors() -> None:
    found = relative_performance(
        {"a": {"m": torch.tensor(1.5)}}, {"a": {"m": torch.tensor(1.0)}}, lower_is_better=()
    )
    assert found.delta == 50
