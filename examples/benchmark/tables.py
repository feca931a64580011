"""Tables of a study in Markdown, and the page that they are filled into."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from examples.benchmark.methods import BASELINES, DENSE, METHODS, OURS
from examples.benchmark.summary import Estimate, Row, margin

__all__ = [
    "delta_table",
    "fill",
    "margin_table",
    "metric_tables",
    "order_table",
    "overview_table",
    "paper_table",
    "provenance",
]

Column: TypeAlias = str | float


def delta_table(rows: Iterable[Row], problem: str) -> str:
    """Delta_T of every method at every sparsity; the best of each column in bold."""
    rows = [row for row in rows if row.problem == problem and row.delta is not None]
    cells = {(row.method, row.sparsity): row for row in rows}
    return _deltas("Delta_T, %", cells, sorted({row.sparsity for row in rows}), _percent)


def overview_table(rows: Iterable[Row], sparsity: float) -> str:
    """Delta_T of every method on every problem, at one sparsity; the best of each in bold."""
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
    """Methods down, `columns` across; what missed its sparsity says so and cannot be the best."""
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
        found = _delta(row, bold=not row.missed and _mean(row) == best[column])
        return f"{found} (n = {len(row.seeds)})" if len(row.seeds) < most else found

    methods = _methods(cells.values())
    body = [[method, *(text(method, column) for column in columns)] for method in methods]
    return _table([corner, *map(label, columns)], body)


def margin_table(rows: Sequence[Row], aims: Mapping[float, float], method: str = OURS) -> str:
    """How far a method is above the best baseline (named), by problem and sparsity.

    Args:
        rows: What `summarize` returned.
        aims: By sparsity the points to be ahead by; a margin that is at least that is in bold.
        method: The method.
    """
    body, without = [], set()
    for problem in dict.fromkeys(row.problem for row in rows):
        cells = [problem]
        for s, aim in aims.items():
            found = margin(rows, method, BASELINES, problem=problem, sparsity=s)
            if found is None:
                cells.append("")
                continue
            without |= {(name, s) for name in found.left_out}
            text = found.ahead.format("+.2f")
            cells.append(f"{f'**{text}**' if found.ahead.mean >= aim else text} ({found.rival})")
        body.append(cells)
    table = _table(
        [f"{method} - best baseline", *(f"{_percent(s)} (aim: {aims[s]:g})" for s in aims)], body
    )
    left_out = {name: sorted(s for other, s in without if other == name) for name, _ in without}
    if not left_out:
        return table
    notes = [
        f"{name} at {', '.join(map(_percent, left_out[name]))}"
        for name in BASELINES
        if name in left_out
    ]
    return f"{table}\n\nNot all seeds or problems have been run yet of: {'; '.join(notes)}."


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
    """How dense each component is left, and whether they come in this order, least dense first."""
    body = []
    rows = [row for row in rows if row.delta is not None]
    methods = _methods(rows)
    for row in sorted(rows, key=lambda row: (row.sparsity, methods.index(row.method))):
        kept = [100 * (1 - row.components[name].mean) for name in components]
        ordered = sum(
            all(own[a] > own[b] for a, b in itertools.pairwise(components))
            for own in row.components_by_seed.values()
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
    header = ["", "zeros", *(f"{name}, % kept" for name in components)]
    return _table([*header, "seeds in order", "Delta_T, %"], body)


def provenance(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many runs there are, how long they took, and where and with what they were made."""
    hours = sum(run.get("seconds", 0.0) for run in runs) / 3600
    seeds = sorted({run["seed"] for run in runs})
    parts = [f"{len(runs)} runs, {hours:.1f} hours of training in all; seeds {seeds}"]
    if failed := [run for run in runs if "failed" in run]:
        parts[0] += f", {len(failed)} of which failed"
    for key in ("machine", "threads"):
        parts.append(f"{key}: {', '.join(sorted({str(r[key]) for r in runs if key in r}))}")
    versions = [run.get("versions", {}) for run in runs if "failed" not in run]
    for name in dict.fromkeys(name for found in versions for name in found):
        known = [found[name] for found in versions if name in found]
        said = "" if len(known) == len(versions) else f" (as {len(known)} of the lines say)"
        parts.append(f"{name} {', '.join(sorted(set(known)))}{said}")
    return "; ".join(parts) + "."


def fill(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    r"""Replace what stands between the markers of a page.

    A block is between `<!-- NAME -->` and `<!-- end -->`, each on a line of its own.

    Args:
        page: The text of the page.
        blocks: For each name what makes its text.

    Raises:
        KeyError: If the page has a block that is not in `blocks`.

    Example:
        >>> print(fill("<!-- a -->\nold\n<!-- end -->", {"a": lambda: "new"}))
        <!-- a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end -->
    """

    def replace(found: re.Match[str]) -> str:
        if found[2] not in blocks:
            raise KeyError(
                f"the page has a block {found[2]!r}, which nothing makes: is there a file of lines "
                f"for it? There are {list(blocks)}"
            )
        return f"{found[1]}\n\n{blocks[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(?ms)^(<!-- ([^\n]+) -->)$.*?^<!-- end -->$", replace, page)


def _at(rows: Iterable[Row], problem: str, sparsity: float) -> list[Row]:
    own = [row for row in rows if row.problem == problem]
    own = [row for row in own if row.method == DENSE or row.sparsity == sparsity]
    order = _methods(own)
    return sorted(own, key=lambda row: order.index(row.method))


def _methods(rows: Iterable[Row]) -> list[str]:
    """The methods: dense, the baselines, ours and its variants, as the harness lists them."""
    found = dict.fromkeys(row.method for row in rows)
    known = [method for method in METHODS if method in found]
    return known + [method for method in found if method not in known]


def _components(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.components))


def _mean(row: Row) -> float:
    assert row.delta is not None
    return row.delta.mean


def _delta(row: Row | None, bold: bool = False) -> str:
    if row is None or row.delta is None:
        return ""
    text = row.delta.format("+.2f")
    text = f"**{text}**" if bold else text
    return f"{text} (at {100 * row.reached.mean:.0f} %)" if row.missed else text


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _zeros(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}"


def _metric(estimate: Estimate) -> str:
    return estimate.format(".2f" if abs(estimate.mean) >= 1 else ".4f")


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])
