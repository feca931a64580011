"""What is made of a study's lines: means, margins, tables, figures and the page."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchmetrics")

from examples.benchmark import (
    Estimate,
    allocation_figure,
    better_table,
    delta_table,
    difference_table,
    fill,
    margin,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    provenance,
    summarize,
    tradeoff_figure,
)


def line(method: str, sparsity: float, seed: int, a: float, b: float, **other: Any) -> Any:
    """A run with a metric of each of two tasks; of the second less is better."""
    dense = method == "dense"
    return {
        "problem": "toy",
        "method": method,
        "sparsity": 0.0 if dense else sparsity,
        "seed": seed,
        "config": {},
        "steps": 10,
        "batch": 4,
        "lr": 0.1,
        "weight_decay": 0.0,
        "device": "cpu",
        "bf16": False,
        "machine": "Some CPU, 2 cores",
        "threads": 1,
        "seconds": 1800.0,
        "reached": 0.0 if dense else sparsity,
        "components": {} if dense else {"shared": sparsity, "a": 1 - (1 - sparsity) / (1 + seed)},
        "metrics": {"a": {"accuracy": a}, "b": {"error": b}},
        "lower_is_better": [["b", "error"]],
        "versions": {"torch": "2.0"},
        **other,
    }


LINES = [
    line("dense", 0.0, 0, 80.0, 0.5),
    line("dense", 0.0, 1, 90.0, 0.4),
    line("adaptive (ours)", 0.9, 0, 80.0, 0.5),  # as dense
    line("adaptive (ours)", 0.9, 1, 81.0, 0.4),  # 10 % worse on a: -5
    line("Taylor", 0.9, 0, 80.0, 0.55),  # 10 % worse on b: -5
    line("Taylor", 0.9, 1, 81.0, 0.44),  # 10 % worse on both: -10
    line("SNIP", 0.9, 0, 40.0, 0.5),  # of the second seed nothing
]


def test_each_run_is_compared_with_the_dense_one_of_its_machine() -> None:
    other = {"machine": "Other CPU, 2 cores"}
    lines = [
        *LINES[:2],
        line("Taylor", 0.9, 0, 80.0, 0.5),
        line("Taylor", 0.9, 1, 45.0, 0.4, **other),
        line("dense", 0.0, 1, 45.0, 0.4, **other),
        line("SNIP", 0.9, 0, 80.0, 0.5, **other),  # no dense run of its machine
    ]
    dense, taylor = summarize(lines)
    assert (dense.method, dense.seeds) == ("dense", (0, 1))
    assert (taylor.method, dict(taylor.by_seed)) == ("Taylor", {0: 0.0, 1: 0.0})
    with pytest.raises(ValueError, match="two runs of 'dense'"):
        summarize([*lines, line("dense", 0.0, 1, 45.0, 0.4, **other)])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_estimates(values: list[float]) -> None:
    found = Estimate.of(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert found.error == pytest.approx(error, abs=1e-9)
    assert found.count == len(values)


def test_estimates_of_one_value_have_no_error() -> None:
    assert math.isnan(Estimate.of([2.0]).error)
    assert str(Estimate.of([2.0])) == "2.00"
    assert Estimate.of([1.0, 2.0]).format("+.1f") == "+1.5 ± 0.5"


def test_rows_are_means_over_seeds_against_the_dense_model_of_the_seed() -> None:
    rows = {row.method: row for row in summarize(LINES)}
    assert list(rows) == ["dense", "adaptive (ours)", "Taylor", "SNIP"]
    assert rows["dense"].delta is None
    ours = rows["adaptive (ours)"]
    assert ours.seeds == (0, 1)
    assert ours.by_seed == pytest.approx({0: 0.0, 1: -5.0})
    assert ours.delta is not None
    assert (ours.delta.mean, ours.delta.error) == pytest.approx((-2.5, 2.5))
    assert ours.tasks["a"].mean == pytest.approx(-5)
    assert ours.tasks["b"].mean == 0
    assert ours.metrics["a"]["accuracy"].mean == 80.5
    assert ours.components["a"].mean == pytest.approx(0.925)
    assert rows["SNIP"].seeds == (0,)


def test_runs_without_their_dense_run_are_left_out() -> None:
    assert [row.seeds for row in summarize(LINES[1:4])] == [(1,), (1,)]
    assert summarize(LINES[2:3]) == []


def test_a_margin_is_that_over_the_best_seed_by_seed() -> None:
    rows = summarize(LINES)
    found = margin(
        rows, "adaptive (ours)", ["Taylor", "SNIP", "absent"], problem="toy", sparsity=0.9
    )
    assert found is not None
    assert found.rival == "Taylor"
    assert (found.ahead.mean, found.ahead.error) == pytest.approx((5.0, 0.0))
    assert margin(rows, "adaptive (ours)", ["SNIP"], problem="toy", sparsity=0.9) is None
    assert margin(rows, "adaptive (ours)", ["Taylor"], problem="toy", sparsity=0.8) is None


def test_lines_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two runs of 'Taylor' on 'toy' at .* out of the file"):
        summarize([*LINES, LINES[4]])
    with pytest.raises(ValueError, match="the runs of 'toy' were not trained alike"):
        summarize([*LINES, line("LTH", 0.9, 0, 80.0, 0.5, steps=20)])


def test_tables() -> None:
    rows = summarize(LINES)
    assert delta_table(rows, "toy").split("\n") == [
        "| Delta_T, % | 90 % |",
        "| --- | ---: |",
        "| SNIP | -25.00 (n = 1) |",
        "| Taylor | -7.50 ± 2.50 |",
        "| adaptive (ours) | **-2.50 ± 2.50** |",
    ]
    assert overview_table(rows, 0.9).split("\n") == [
        "| Delta_T, % at 90 % | toy |",
        *delta_table(rows, "toy").split("\n")[1:],
    ]
    paper = paper_table(rows, "toy", 0.9).split("\n")
    assert (
        paper[0] == "|  | Δ a | Δ b | Delta_T, % | shared, % zero | a, % zero | overall, % zero |"
    )
    assert paper[2] == "| dense |  |  |  |  |  |  |"
    assert (
        paper[5]
        == "| adaptive (ours) | -5.00 ± 5.00 | +0.00 ± 0.00 | -2.50 ± 2.50 | 90.0 | 92.5 | 90.0 |"
    )
    first, second = metric_tables(rows, "toy", 0.9).split("\n\n")
    assert first.split("\n")[2] == "| dense | 85.00 ± 5.00 |"
    assert second.split("\n")[5] == "| adaptive (ours) | 0.4500 ± 0.0500 |"


def test_differences_are_bold_where_all_seeds_agree() -> None:
    better = [line("reach 1.5", 0.9, 0, 80.0, 0.5), line("reach 1.5", 0.9, 1, 82.8, 0.4)]
    rows = summarize([*LINES, *better])
    methods = ["Taylor", "SNIP", "reach 1.5", "IMP"]
    assert difference_table(rows, methods, [0.9]).split("\n") == [
        "| minus adaptive (ours), at 90 % | toy |",
        "| --- | ---: |",
        "| Taylor | **-5.0 ± 0.0** |",
        "| SNIP | -25.0 |",
        "| reach 1.5 | +0.5 ± 0.5 |",  # no difference in one seed
    ]
    both = difference_table(rows, ["Taylor"], [0.9, 0.97]).split("\n")
    assert both[0] == "| minus adaptive (ours), at 90 / 97 % | toy |"
    assert both[2] == "| Taylor | **-5.0 ± 0.0** / none |"


def test_better_is_what_wins_in_every_seed() -> None:
    winning = [line("IMP", 0.9, 0, 88.0, 0.5), line("IMP", 0.9, 1, 82.8, 0.4)]
    once = [line("LTH", 0.9, 0, 96.0, 0.5), line("LTH", 0.9, 1, 80.1, 0.4)]
    denser = [line("paper", 0.9, seed, 100.0, 0.1, reached=0.31) for seed in (0, 1)]
    rows = summarize([*LINES, *winning, *once, *denser])
    assert better_table(rows, [0.9, 0.97]).split("\n") == [
        "| problem | better in every seed at 90 % | better in every seed at 97 % |",
        "| --- | --- | --- |",
        "| toy | IMP (+3.0 ± 2.0) |  |",
    ]


def test_what_missed_its_sparsity_is_never_the_best() -> None:
    missed = [line("paper", 0.9, seed, 100.0, 0.1, reached=0.31) for seed in (0, 1)]
    rows = summarize([*LINES, *missed])
    table = delta_table(rows, "toy").split("\n")
    assert "**-2.50 ± 2.50**" in table[4]
    assert table[5].startswith("| paper | +")
    assert table[5].endswith("(at 31 %) |")


def test_failed_runs_are_left_out_and_bad_figures_name_their_run() -> None:
    failed = {**LINES[2], "seed": 2, "failed": "NaN"}
    assert summarize([*LINES, failed]) == summarize(LINES)
    with pytest.raises(ValueError, match="with seed 1 cannot be compared"):
        summarize([*LINES, line("LTH", 0.9, 1, math.nan, 0.5)])


def test_the_order_of_components_is_counted_by_seed() -> None:
    rows = [row for row in summarize(LINES) if row.method == "Taylor"]
    table = order_table(rows, ["a", "shared"]).split("\n")
    # The second seed leaves a half as dense as the shared part, the first leaves both alike.
    assert table[2] == "| Taylor | 90 % | 7.5 | 10.0 | 1 of 2 | -7.50 ± 2.50 |"


def test_methods_and_sparsities_come_in_order() -> None:
    mixed = [
        line(method, sparsity, 0, 80.0, 0.5)
        for sparsity in (0.97, 0.9)
        for method in ("adaptive (ours)", "dense", "Taylor")
        if method != "dense" or sparsity == 0.9
    ]
    table = order_table(summarize(mixed), ["a", "shared"]).split("\n")[2:]
    assert [row.split(" | ")[:2] for row in table] == [
        [f"| {method}", f"{percent} %"]
        for percent in (90, 97)
        for method in ("Taylor", "adaptive (ours)")
    ]


def test_provenance() -> None:
    assert provenance(LINES) == (
        "7 runs, 3.5 hours of training in all; seeds [0, 1]; machine: Some CPU, 2 cores; "
        "threads: 1; torch 2.0."
    )
    newer = line("IMP", 0.9, 0, 80.0, 0.5, versions={"torch": "2.1", "timm": "1.0"})
    assert provenance([*LINES, newer]).endswith("torch 2.0, 2.1; timm 1.0 (as 1 of the lines say).")
    failed = {"method": "Taylor", "seed": 2, "failed": "NaN"}
    assert provenance([*LINES, failed]).startswith(
        "8 runs, 3.5 hours of training in all; seeds [0, 1, 2], 1 of which failed;"
    )


def test_only_what_is_between_markers_is_replaced() -> None:
    page = "# A\n\n<!-- one -->\n\nold\n\n<!-- end -->\n\ntext\n\n<!-- two -->\n<!-- end -->\n"
    once = fill(page, {"one": lambda: "1", "two": lambda: "2"})
    assert once == (
        "# A\n\n<!-- one -->\n\n1\n\n<!-- end -->\n\ntext\n\n<!-- two -->\n\n2\n\n<!-- end -->\n"
    )
    assert fill(once, {"one": lambda: "1", "two": lambda: "2"}) == once
    with pytest.raises(KeyError, match="the page has a block 'two', which nothing makes"):
        fill(page, {"one": lambda: "1"})


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = summarize(LINES)
    figure = tradeoff_figure(rows, ["adaptive (ours)", "Taylor", "absent"])
    (axis,) = figure.axes
    curves = dict(zip(axis.get_legend_handles_labels()[1], axis.containers, strict=True))
    assert list(curves) == ["adaptive (ours)", "Taylor"]
    assert curves["adaptive (ours)"][0].get_ydata().tolist() == pytest.approx([-2.5])
    figure.savefig(tmp_path / "tradeoff.png")
    (axis,) = allocation_figure(rows, 0.9, ["adaptive (ours)", "Taylor"]).axes
    heights = [bar.get_height() for bar in axis.containers[0]]
    assert heights == pytest.approx([10.0, 7.5])
