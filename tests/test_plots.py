"""The pictures show the numbers that they are given, and their text does not overlap."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_adapmtl import ComponentRow, History, LayerRow, Report

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from torch_adapmtl.plots import (
    _apart,
    plot_allocation,
    plot_sparsity,
    plot_task_weights,
    plot_tradeoff,
)


def history(tasks: int = 3, rows: int = 40, **changes: Any) -> History:
    names = [f"task {i}" for i in range(tasks)]
    parts = {"shared": 0.95, **{name: 0.8 + 0.001 * i for i, name in enumerate(names)}}
    times = [i / (rows - 1 or 1) for i in range(rows)]
    ends = {**parts, "overall": 0.9}
    values: dict[str, Any] = {
        "steps": [10 * (i + 1) for i in range(rows)],
        "sparsity": {name: [end * t for t in times] for name, end in ends.items()},
        "pruned": [0.9 * t for t in times],
        "thresholds": {name: [(1e-4 * t, 1e-2 * t) for t in times] for name in parts},
        "task_weights": {name: [1 + 0.1 * i * t for t in times] for i, name in enumerate(names)},
        "losses": {
            name: [None if j % 4 == i else 10 ** (-i - t) for j, t in enumerate(times)]
            for i, name in enumerate(names)
        },
        "target_sparsity": 0.9,
    }  # fmt: skip
    return History(**{**values, **changes})


def report(sizes: list[tuple[int, int]], components: int = 2) -> Report:
    """Layers with so many weights and zeros, in turn in each of the components."""
    names = [f"part {i}" for i in range(components)]
    layers = tuple(
        LayerRow(f"encoder.blocks.{i}.conv.weight", names[i % components], (weights,), zeros, 0.1)
        for i, (weights, zeros) in enumerate(sizes)
    )
    rows = (
        ComponentRow(name, len(own), sum(r.weights for r in own), sum(r.zeros for r in own))
        for name in names
        if (own := [row for row in layers if row.component == name])
    )
    return Report(tuple(rows), layers, target_sparsity=0.9, step=1, total_steps=1)


ROWS = [
    {"name": "dense", "group": "dense", "accuracy": 93.0, "ms": 2.3, "mb": 11.2},
    {"name": "90 %", "group": "pruned", "accuracy": 92.8, "ms": 1.2},
    {"name": "95 %", "group": "pruned", "accuracy": 92.1, "ms": 1.0, "mb": 1.1},
]
TRADEOFF: dict[str, Any] = {"x": {"ms": "ms", "mb": "MB"}, "y": {"accuracy": "accuracy"}}
FIGURES = {
    "sparsity": lambda: plot_sparsity(history()),
    "sparsity, eleven tasks": lambda: plot_sparsity(history(11)),
    "sparsity, without thresholds": lambda: plot_sparsity(history(thresholds={})),
    "sparsity, macs": lambda: plot_sparsity(history(count="macs")),
    "sparsity, one row": lambda: plot_sparsity(history(rows=1)),
    "sparsity, 20,000 steps": lambda: plot_sparsity(
        history(steps=[500 * (i + 1) for i in range(40)])
    ),
    "task weights": lambda: plot_task_weights(history()),
    "task weights, eleven tasks": lambda: plot_task_weights(history(11)),
    "allocation": lambda: plot_allocation(report([(1000, 900), (20, 0), (5_000_000, 4_999_999)])),
    "allocation, sixty layers": lambda: plot_allocation(
        report([(100 * (i + 1), 90 * (i + 1)) for i in range(60)], 4)
    ),
    "allocation, an empty layer": lambda: plot_allocation(report([(1000, 1000), (20, 20)])),
    "tradeoff": lambda: plot_tradeoff(ROWS, **TRADEOFF),
}


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[Text]:
    """All texts that can be seen."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    panels = {id(t): axis for axis in figure.axes for t in axis.findobj(Text)}
    seen = []
    for text in found:
        axis, (x, y) = panels.get(id(text)), text.get_position()
        if axis is not None and text in axis.get_xticklabels():
            low, high = sorted(axis.get_xlim())
            if not low <= x <= high or not text.axes:
                continue
        if axis is not None and text in axis.get_yticklabels():
            low, high = sorted(axis.get_ylim())
            if not low <= y <= high:
                continue
        seen.append(text)
    return seen


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_large_enough_lies_within_and_does_not_overlap(name: str) -> None:
    figure = drawn(FIGURES[name]())
    assert figure.get_figwidth() == 7.0
    boxes = [(text.get_text(), text.get_window_extent(), text) for text in texts(figure)]
    assert len(boxes) > 4
    page = figure.bbox
    for words, box, text in boxes:
        assert text.get_fontsize() >= 7.5  # 10 pixels on a page of 700
        assert page.x0 - 1 <= box.x0, words
        assert box.x1 <= page.x1 + 1, words
        assert page.y0 - 1 <= box.y0, words
        assert box.y1 <= page.y1 + 1, words
    for i, (words, box, _) in enumerate(boxes):
        for others, other, _ in boxes[:i]:
            wide = min(box.x1, other.x1) - max(box.x0, other.x0)
            high = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(wide, high) < 2.5, (words, others)


def lines(axis: Axes, color: str) -> list[tuple[list[float], list[float]]]:
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))  # type: ignore[arg-type]
        for line in axis.get_lines()
        if to_hex(line.get_color()) == color
    ]


def test_sparsity_shows_the_history() -> None:
    given_ = history()
    above, *below = plot_sparsity(given_).axes
    colors = {}
    for text in above.texts:
        name, *_ = text.get_text().split("  ")
        colors[name] = to_hex(text.get_color())
    assert len({colors[name] for name in given_.sparsity}) == len(given_.sparsity)
    for name, values in given_.sparsity.items():
        assert (given_.steps, [100 * value for value in values]) in lines(above, colors[name])
    assert [panel.get_title() for panel in below] == list(given_.thresholds)
    for panel in below:
        name = panel.get_title()
        shown = [pair for pair in given_.thresholds[name] if pair[0] > 0]
        low, high = lines(panel, colors[name])
        assert low == (given_.steps[1:], [pair[0] for pair in shown])
        assert high == (given_.steps[1:], [pair[1] for pair in shown])
        assert panel.get_yscale() == "log"


def test_macs_have_a_line_of_their_own() -> None:
    axis = plot_sparsity(history(count="macs", pruned=[0.5] * 40)).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert "multiply-adds  50.0 %" in texts
    assert "target 90 % of the multiply-adds" in texts


def test_histories_of_one_row_and_without_losses() -> None:
    given_ = history(rows=1, losses={f"task {i}": [None] for i in range(3)})
    above, below = plot_task_weights(given_).axes
    assert all(line.get_marker() == "o" for line in above.lines[:-1])
    assert not below.lines
    assert plot_sparsity(given_).axes[0].lines[0].get_marker() == "o"
    assert plot_task_weights(history(losses={}, task_weights={})).axes


def test_names_are_drawn_as_they_are_and_long_ones_are_shortened() -> None:
    names = ["$a$", "$bad{$", "x" * 60, "first of many: segmentation, depth"]
    given_ = history(
        task_weights={name: [1.0] * 40 for name in names},
        losses={name: [1.0] * 40 for name in names},
        sparsity={name: [0.5] * 40 for name in (*names, "overall")},
        thresholds={name: [(0.1, 0.2)] * 40 for name in names},
    )
    for figure in (plot_task_weights(given_), plot_sparsity(given_)):
        figure.draw_without_rendering()
        texts = [t.get_text() for axis in figure.axes for t in (*axis.texts, axis.title)]
        assert any(text.startswith(r"\$bad{\$") for text in texts)
        assert max(map(len, texts)) < 40
    layers = [f"model.prefix.{i}.encoder.backbone.block.attention.projection" for i in range(3)]
    report = Report(
        (ComponentRow("shared", 3, 30, 3),),
        tuple(LayerRow(name, "shared", (10,), 1, 0.1) for name in layers),
        0.1,
        1,
        1,
    )
    labels = [t.get_text() for t in plot_allocation(report).axes[0].get_yticklabels()]
    assert len(set(labels)) == 4


def test_rows_without_numbers_are_left_out() -> None:
    rows = [*ROWS, {"name": "no y", "ms": 3.0}, {"ms": 1.5, "mb": 1.5, "acc": None}]
    rows.append({"ms": 2.0, "acc": 90.0})  # no name, no mb
    key = next(iter(TRADEOFF["y"]))
    rows = [{key if k == "acc" else k: v for k, v in row.items()} for row in rows]
    first, second = plot_tradeoff(rows, **TRADEOFF).axes
    assert [len(axis.texts) for axis in (first, second)] == [4, 2]


def test_task_weights_shows_the_history() -> None:
    given_ = history()
    above, below = plot_task_weights(given_).axes
    for task, weights in given_.task_weights.items():
        (text,) = (t for t in above.texts if t.get_text().startswith(task))
        color = to_hex(text.get_color())
        assert (given_.steps, weights) in lines(above, color)
        pairs = zip(given_.steps, given_.losses[task], strict=True)
        known = [(float(step), loss) for step, loss in pairs if loss is not None]
        raw, smooth = lines(below, color)
        assert list(zip(*raw, strict=True)) == known
        assert smooth[0] == raw[0]
        assert min(raw[1]) <= min(smooth[1]) <= max(smooth[1]) <= max(raw[1])
    assert below.get_yscale() == "log"


def test_losses_that_are_negative_and_tasks_without_any() -> None:
    losses = {"task 0": [-1.0] * 40, "task 1": [None] * 40, "task 2": [1.0] * 40}
    below = plot_task_weights(history(losses=losses)).axes[1]
    assert below.get_yscale() == "linear"
    assert {t.get_text() for t in below.texts} == {"task 0  -1", "task 2  1"}


def test_a_task_and_its_component_have_one_colour() -> None:
    pictures = plot_sparsity(history()).axes[0], plot_task_weights(history()).axes[0]
    first, second = (
        {t.get_text().split("  ")[0]: t.get_color() for t in axis.texts} for axis in pictures
    )
    assert all(first[f"task {i}"] == second[f"task {i}"] for i in range(3))


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 10**8), st.floats(0, 1)).map(lambda p: (p[0], int(p[0] * p[1]))),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_allocation_shows_every_layer(sizes: list[tuple[int, int]]) -> None:
    made = report(sizes)
    (axis,) = plot_allocation(made).axes
    left, right = axis.get_xlim()
    found = []
    for line in axis.get_lines():
        if len(line.get_xdata()) == 2:  # type: ignore[arg-type]
            (kept, weights), (y, _) = map(list, (line.get_xdata(), line.get_ydata()))
            assert left < kept <= weights < right
            found.append((kept, weights, y))
    by_row = {y: (kept, weights) for kept, weights, y in found}
    labels = [label.get_text() for label in axis.get_yticklabels()]
    names = dict(zip(labels, axis.get_yticks(), strict=True))
    least = min([row.weights - row.zeros for row in made.layers if row.weights > row.zeros] or [1])
    assert len(by_row) == len(sizes)
    for row in made.layers:
        kept, weights = by_row[names[row.name.removesuffix(".weight")]]
        assert weights == row.weights
        assert kept == row.weights - row.zeros or (row.zeros == row.weights and kept < least)
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first layer is at the top


def test_tradeoff_shows_the_points() -> None:
    first, second = plot_tradeoff(ROWS, **TRADEOFF).axes
    points = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in first.lines]  # type: ignore[arg-type]
    assert points == [[(2.3, 93.0)], [(1.0, 92.1), (1.2, 92.8)]]
    assert [text.get_text() for text in second.texts] == ["dense", "95 %"]


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: plot_sparsity(history(rows=0)), "history has no rows .* call pruner.step"),
        (lambda: plot_task_weights(history(rows=0)), "history has no rows"),
        (lambda: plot_allocation(Report((), (), 0.5, 0, 1)), "report has no layers"),
        (lambda: plot_tradeoff([], **TRADEOFF), r"rows, x and y .* got 0, \['ms', 'mb'\]"),
        (lambda: plot_tradeoff(ROWS, x={}, y={"a": "b"}), r"got 3, \[\]"),
        (lambda: plot_tradeoff(ROWS, x={"typo": ""}, y=TRADEOFF["y"]), "numbers of 'typo'"),
        (lambda: plot_tradeoff(ROWS, x={"ms": ""}, y={"typo": ""}), "must have 'typo'"),
        (lambda: plot_tradeoff([{**ROWS[0], "ms": 0}], **TRADEOFF), "positive.*'ms', found"),
        (lambda: plot_tradeoff(ROWS, x="ms", y="acc"), "x must be a mapping.*found 'ms'"),
        (lambda: plot_tradeoff([{**ROWS[0], "ms": "3"}], **TRADEOFF), "found '3' as 'ms'"),
    ],
)
def test_what_cannot_be_drawn(draw: Any, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        draw()


@given(wanted=st.lists(st.floats(0, 1), max_size=12).map(sorted), distance=st.floats(0.001, 0.2))
def test_labels_move_apart_and_no_further(wanted: list[float], distance: float) -> None:
    places = _apart(wanted, distance)
    assert len(places) == len(wanted)
    gaps = [b - a for a, b in pairwise(places)]
    assert all(gap >= distance - 1e-9 for gap in gaps)
    if all(b - a >= distance for a, b in pairwise(wanted)):
        assert places == pytest.approx(wanted)
    assert sum(places) == pytest.approx(sum(wanted))


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nimport torch_adapmtl\n"
        "try:\n    import torch_adapmtl.plots\nexcept ImportError as error:\n    print(error)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert 'install it with pip install "torch-adapmtl[plots]"' in done.stdout
