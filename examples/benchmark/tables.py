"""Tables of a study in Markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from examples.benchmark.methods import BASELINES, DENSE, METHODS, OURS, STABLE
from examples.benchmark.ranking import mean_margin, mean_ranks, scores
from examples.benchmark.summary import Estimate, Row, differences, margin

__all__ = [
    "better_table",
    "delta_table",
    "difference_table",
    "metric_tables",
    "order_table",
    "overview_table",
    "paper_table",
    "rank_table",
    "suite_table",
    "weighting_table",
]

Column: TypeAlias = str | float


def delta_table(rows: Iterable[Row], problem: str) -> str:
    """Delta_T of every method at every sparsity on one problem; the best of a column in bold."""
    rows = [row for row in rows if row.problem == problem and row.delta is not None]
    cells = {(row.method, row.sparsity): row for row in rows}
    return _deltas("Delta_T, %", cells, sorted({row.sparsity for row in rows}), _percent)


def overview_table(rows: Iterable[Row], sparsity: float) -> str:
    """Delta_T of every method on every problem at one sparsity; the best of a column in bold."""
    rows = [row for row in rows if row.delta is not None and row.sparsity == sparsity]
    cells = {(row.method, row.problem): row for row in rows}
    problems = list(dict.fromkeys(row.problem for row in rows))
    return _deltas(f"Delta_T, % at {_percent(sparsity)}", cells, problems, str)


def _deltas(
    corner: str,
    cells: Mapping[Any, Row],
    columns: Sequence[Column],
    label: Callable[[Any], str],
) -> str:
    """Methods down, `columns` across; a run that missed its sparsity is never the best."""
    most = max((len(row.seeds) for row in cells.values()), default=0)
    best = {
        column: max(
            (_mean(row) for (_, c), row in cells.items() if c == column and not row.missed),
            default=math.nan,
        )
        for column in columns
    }

    def text(method: str, column: Column) -> str:
        row = cells.get((method, column))
        if row is None:
            return ""
        delta = _delta(row, bold=not row.missed and _mean(row) == best[column])
        return f"{delta} (n = {len(row.seeds)})" if len(row.seeds) < most else delta

    methods = _methods(cells.values())
    body = [[method, *(text(method, column) for column in columns)] for method in methods]
    return _table([corner, *map(label, columns)], body)


def suite_table(rows: Sequence[Row], sparsities: Sequence[float], method: str = OURS) -> str:
    """How far a method is ahead of the best baseline (named) of each problem, and on average.

    The last line has the mean over the problems, and its bootstrap interval of 95 %. A column
    compares the baselines that were run on all problems at its sparsity. A note names those that
    lack some of the method's runs.

    Args:
        rows: What `summarize` returned.
        sparsities: The columns, as fractions.
        method: The method.
    """
    problems = list(dict.fromkeys(row.problem for row in rows if row.method == method))
    body = [[problem] for problem in problems]
    means = ["mean"]
    for sparsity in sparsities:
        rivals = _complete(rows, problems, sparsity)
        for cells, problem in zip(body, problems, strict=True):
            ahead = margin(rows, method, rivals, problem=problem, sparsity=sparsity)
            cells.append(f"{ahead.ahead.format('+.2f')} ({ahead.rival})" if ahead else "")
        found = scores(rows, [method, *rivals], sparsity)
        means.append(f"**{mean_margin(found, method)}**" if found and rivals else "")
    header = [f"{method} minus the best baseline", *map(_percent, sparsities)]
    table = _table(header, [*body, means])
    missing = [
        f"{name} at {_percent(sparsity)}"
        for sparsity in sparsities
        for name in BASELINES
        if _lacks(rows, name, method, sparsity)
    ]
    if not missing:
        return table
    return f"{table}\n\nNot all seeds or problems have been run yet of: {', '.join(missing)}."


def rank_table(rows: Sequence[Row], sparsities: Sequence[float], method: str = OURS) -> str:
    """The mean rank over the problems of a method and the baselines; 1 is best.

    A column has the methods that were run on all problems at its sparsity; their number is in
    brackets.

    Args:
        rows: What `summarize` returned.
        sparsities: The columns, as fractions.
        method: The method.
    """
    problems = list(dict.fromkeys(row.problem for row in rows if row.method == method))
    columns = []
    for sparsity in sparsities:
        methods = [method, *_complete(rows, problems, sparsity)]
        columns.append(mean_ranks(scores(rows, methods, sparsity)))
    named = dict.fromkeys(name for column in columns for name in column)
    ordered = sorted(named, key=lambda name: columns[0].get(name, math.inf))
    body = [
        [name, *(f"{column[name]:.1f}" if name in column else "" for column in columns)]
        for name in ordered
    ]
    header = [f"{_percent(s)} (of {len(c)})" for s, c in zip(sparsities, columns, strict=True)]
    return _table(["mean rank", *header], body)


def weighting_table(rows: Sequence[Row], sparsity: float) -> str:
    """What the stability weighting is worth under each method, over the problems.

    Delta_T with equal task weights and with the stability weighting, the mean over the problems
    that have both; and their difference with its bootstrap interval of 95 %.

    Args:
        rows: What `summarize` returned.
        sparsity: At which sparsity, as a fraction.
    """
    pairs = {name: (name, f"{name}, stability weights") for name in BASELINES}
    pairs[OURS] = OURS, STABLE
    body = []
    for name, (equal, weighted) in pairs.items():
        found = scores(rows, (equal, weighted), sparsity)
        if not found:
            continue
        means = [
            fmean(fmean(by_method[m].values()) for by_method in found.values())
            for m in (equal, weighted)
        ]
        body.append([name, *(f"{mean:+.1f}" for mean in means), str(mean_margin(found, weighted))])
    return _table(["", "equal weights", "stability weights", "difference"], body)


def _lacks(rows: Iterable[Row], name: str, method: str, sparsity: float) -> bool:
    """Whether some runs of `name` at a sparsity are there, but not all that a method has."""
    here = [row for row in rows if row.sparsity == sparsity]
    own = {(row.problem, seed) for row in here if row.method == name for seed in row.seeds}
    wanted = {(row.problem, seed) for row in here if row.method == method for seed in row.seeds}
    return bool(own) and not wanted <= own


def _complete(rows: Iterable[Row], problems: Sequence[str], sparsity: float) -> list[str]:
    """The baselines that have runs on all problems at a sparsity."""
    here = {(row.method, row.problem) for row in rows if row.sparsity == sparsity}
    return [name for name in BASELINES if all((name, problem) in here for problem in problems)]


def difference_table(
    rows: Sequence[Row], methods: Sequence[str], sparsities: Sequence[float], reference: str = OURS
) -> str:
    """Delta_T of methods minus that of a reference, seed by seed, on every problem.

    A cell has a value for each sparsity, in bold where the sign is the same in all of several
    seeds. Methods without a run are left out.
    """
    problems = list(dict.fromkeys(row.problem for row in rows if row.method == reference))
    body = []
    for method in methods:
        cells = []
        for problem in problems:
            values = [_difference(rows, method, reference, problem, s) for s in sparsities]
            cells.append(" / ".join(value or "none" for value in values) if any(values) else "")
        if any(cells):
            body.append([method, *cells])
    zeros = " / ".join(f"{100 * sparsity:g}" for sparsity in sparsities)
    return _table([f"minus {reference}, at {zeros} %", *problems], body)


def _difference(
    rows: Iterable[Row], method: str, reference: str, problem: str, sparsity: float
) -> str:
    row, base = (_row(rows, name, problem, sparsity) for name in (method, reference))
    points = differences(row, base) if row and base else []
    if not row or not points:
        return ""
    text = Estimate.of(points).format("+.1f")
    alike = len(points) > 1 and (min(points) > 0 or max(points) < 0)
    return (f"**{text}**" if alike else text) + _reached(row)


def better_table(rows: Sequence[Row], sparsities: Sequence[float], method: str = OURS) -> str:
    """Which methods are better than one in every seed, by problem and sparsity."""
    body = []
    for problem in dict.fromkeys(row.problem for row in rows):
        cells = [_better(rows, method, problem, sparsity) for sparsity in sparsities]
        if any(cells):
            body.append([problem, *cells])
    header = ["problem", *(f"better in every seed at {_percent(s)}" for s in sparsities)]
    return _table(header, body, sides="l" * len(header))


def _better(rows: Sequence[Row], method: str, problem: str, sparsity: float) -> str:
    base = _row(rows, method, problem, sparsity)
    better = []
    for row in rows:
        alike = (row.problem, row.sparsity) == (problem, sparsity)
        points = differences(row, base) if base and alike and row.method != method else []
        if points and min(points) > 0 and not row.missed:
            better.append((row.method, Estimate.of(points)))
    better.sort(key=lambda pair: -pair[1].mean)
    return "; ".join(f"{name} ({points.format('+.1f')})" for name, points in better)


def paper_table(rows: Iterable[Row], problem: str, sparsity: float) -> str:
    """Delta of each task and overall, and the sparsity of each component, at one sparsity."""
    rows = _at(rows, problem, sparsity)
    tasks, components = list(rows[0].tasks), _components(rows)
    header = ["", *(f"Δ {task}" for task in tasks), "Delta_T, %"]
    header += [f"{name}, % zero" for name in components] + ["overall, % zero"]
    body = []
    for row in rows:
        cells = [row.method]
        cells += ["" if row.delta is None else e.format("+.2f") for e in row.tasks.values()]
        cells.append(_delta(row))
        for name in components:
            cells.append(_zeros(row.components[name]) if name in row.components else "")
        cells.append("" if row.delta is None else _zeros(row.reached))
        body.append(cells)
    return _table(header, body)


def metric_tables(rows: Iterable[Row], problem: str, sparsity: float) -> str:
    """Every metric, a table for each task, at one sparsity."""
    rows = _at(rows, problem, sparsity)
    parts = []
    for task, metrics in rows[0].metrics.items():
        header = [task, *(name.replace("_", " ") for name in metrics)]
        body = [[row.method, *(_metric(e) for e in row.metrics[task].values())] for row in rows]
        parts.append(_table(header, body))
    return "\n\n".join(parts)


def order_table(rows: Iterable[Row], components: Sequence[str]) -> str:
    """The density of each component, and in how many seeds they rise in the order given."""
    body = []
    rows = [row for row in rows if row.delta is not None]
    methods = _methods(rows)
    for row in sorted(rows, key=lambda row: (row.sparsity, methods.index(row.method))):
        kept = [100 * (1 - row.components[name].mean) for name in components]
        ordered = sum(
            all(zeros[a] > zeros[b] for a, b in itertools.pairwise(components))
            for zeros in row.components_by_seed.values()
        )
        body.append(
            [
                row.method,
                _percent(row.sparsity),
                *(f"{k:.1f}" for k in kept),
                f"{ordered} of {len(row.seeds)}",
                _delta(row),
            ]
        )
    header = ["", "zeros", *(f"{name}, % nonzero" for name in components)]
    return _table([*header, "seeds in order", "Delta_T, %"], body)


def _row(rows: Iterable[Row], method: str, problem: str, sparsity: float) -> Row | None:
    wanted = method, problem, sparsity
    return next((r for r in rows if (r.method, r.problem, r.sparsity) == wanted), None)


def _at(rows: Iterable[Row], problem: str, sparsity: float) -> list[Row]:
    chosen = [
        row
        for row in rows
        if row.problem == problem and (row.method == DENSE or row.sparsity == sparsity)
    ]
    order = _methods(chosen)
    return sorted(chosen, key=lambda row: order.index(row.method))


def _methods(rows: Iterable[Row]) -> list[str]:
    """The methods: dense, the baselines, ours and its variants, as the harness lists them."""
    names = dict.fromkeys(row.method for row in rows)
    known = [method for method in METHODS if method in names]
    return known + [method for method in names if method not in known]


def _components(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.components))


def _mean(row: Row) -> float:
    assert row.delta is not None
    return row.delta.mean


def _delta(row: Row, bold: bool = False) -> str:
    if row.delta is None:
        return ""
    text = row.delta.format("+.2f")
    return (f"**{text}**" if bold else text) + _reached(row)


def _reached(row: Row) -> str:
    """The sparsity that the runs ended at, where it is not what was asked for."""
    return f" (at {100 * row.reached.mean:.0f} %)" if row.missed else ""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _zeros(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}"


def _metric(estimate: Estimate) -> str:
    return estimate.format(".2f" if abs(estimate.mean) >= 1 else ".4f")


def _table(header: Sequence[str], body: Iterable[Sequence[str]], sides: str = "") -> str:
    """A Markdown table; `sides` has a letter, l or r, for each column (default: l, then r)."""
    sides = sides or "l" + "r" * (len(header) - 1)
    rule = [{"l": "---", "r": "---:"}[side] for side in sides]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])
