"""The report: its arithmetic, and that text, HTML and dict say the same."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from html_tables import tables_of
from hypothesis import given
from hypothesis import strategies as st

from torch_adapmtl import Report
from torch_adapmtl.run.report import ComponentRow, DensePart, LayerRow


def example(**changes: object) -> Report:
    report = Report(
        components=(
            ComponentRow("shared", 2, 600, 480),
            ComponentRow("depth+normal", 1, 1_000_000, 999_999),
            ComponentRow("seg", 1, 400, 400),
        ),
        layers=(
            LayerRow("body.0.weight", "shared", (20, 15), 200, 0.01),
            LayerRow("body.1.weight", "shared", (20, 15), 280, 0.03),
            LayerRow("mid.weight", "depth+normal", (1000, 1000), 999_999, 1.5),
            LayerRow("seg.weight", "seg", (20, 20), 400, 0.02),
        ),
        target_sparsity=0.9,
        step=1234,
        total_steps=20_000,
        dense=[("aux.weight", "unused", 1200), ("stem.weight", "frozen", 7)],
        task_weights={"seg": 1.25, "depth": 0.75},
    )
    return dataclasses.replace(report, **changes)


def test_text() -> None:
    assert str(example()).splitlines() == [
        "component     tensors    weights      zeros  sparsity      threshold",
        "shared              2        600        480   80.00 %  0.01 ... 0.03",
        "depth+normal        1  1,000,000    999,999   99.99 %            1.5",
        "seg                 1        400        400  100.00 %           0.02",
        "overall             4  1,001,000  1,000,879   99.99 %",
        "target 90.00 %, step 1,234 of 20,000",
        "task weights: seg 1.25, depth 0.75",
        "left dense, not counted: 1,207 weights",
        "  aux.weight   unused  1,200",
        "  stem.weight  frozen      7",
    ]


def test_text_without_the_optional_parts() -> None:
    text = str(example(dense=(), task_weights={}, layers=()))
    assert text.splitlines()[-1] == "target 90.00 %, step 1,234 of 20,000"
    assert len(text.splitlines()) == 6


def test_html_says_the_same() -> None:
    components, layers, dense = tables_of(example())
    assert components[2] == ["depth+normal", "1", "1,000,000", "999,999", "99.99 %", "1.5"]
    assert components[-1][0] == "overall"
    assert layers[1] == ["body.0.weight", "shared", "20 x 15", "300", "200", "66.67 %", "0.01"]
    assert dense[1:] == [["aux.weight", "unused", "1,200"], ["stem.weight", "frozen", "7"]]


def test_html_escapes_names() -> None:
    name = "<script>alert('x')</script> & co"
    report = example(
        components=(ComponentRow(name, 1, 1, 0),),
        layers=(LayerRow(name, name, (1,), 0, 0.0),),
        dense=[(name, name, 1)],
        task_weights={name: 1.0},
    )
    assert "<script>" not in report._repr_html_()
    assert tables_of(report)[0][1][0] == name


def test_dict_is_json() -> None:
    found = json.loads(json.dumps(example().to_dict()))
    assert found["sparsity"] == example().sparsity
    assert found["components"][0] == {
        "name": "shared",
        "tensors": 2,
        "weights": 600,
        "zeros": 480,
        "sparsity": 0.8,
        "macs": None,
        "macs_left": None,
        "thresholds": [0.01, 0.03],
    }
    assert found["layers"][3]["shape"] == [20, 20]
    assert found["layers"][3]["threshold"] == 0.02
    assert found["dense"][0] == {"name": "aux.weight", "reason": "unused", "weights": 1200}
    assert found["task_weights"] == {"seg": 1.25, "depth": 0.75}


def test_frozen_and_its_own() -> None:
    weights, dense = {"a": 1.0}, [("x", "unused", 1)]
    report = example(task_weights=weights, dense=dense)
    weights["a"] = 2.0
    dense.clear()
    assert report.task_weights == {"a": 1.0}
    assert report.dense == (DensePart("x", "unused", 1),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.step = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(report)) == report


def test_thresholds_of_a_component() -> None:
    assert example().thresholds("shared") == (0.01, 0.03)
    assert example().thresholds("nobody") is None


rows = st.lists(
    st.tuples(st.integers(1, 10**9), st.floats(0, 1)).map(lambda t: (t[0], int(t[0] * t[1]))),
    max_size=6,
)


@given(rows)
def test_overall_is_zeros_over_weights_and_lines_are_aligned(found: list[tuple[int, int]]) -> None:
    components = tuple(
        ComponentRow(f"t{10**i}", 1, weights, zeros) for i, (weights, zeros) in enumerate(found)
    )
    report = example(components=components, layers=(), dense=(), task_weights={})
    weights, zeros = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0)
    assert report.sparsity == (zeros / weights if weights else 0)
    lines = str(report).splitlines()[:-1]
    assert len(lines) == len(found) + 2
    ends = {line.index("%") for line in lines[1:]}
    assert len(ends) == 1
    assert all(
        ("100.00 %" in line) == (z == w) for line, (w, z) in zip(lines[1:], found, strict=False)
    )
