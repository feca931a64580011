"""Tables of a study in Markdown, and the page that they are filled into."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch_adapmtl.benchmark.methods import BASELINES, DENSE
from torch_adapmtl.benchmark.summary import Estimate, Row, margin

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

OURS = "AdapMTL"


def delta_table(rows: Iterable[Row], problem: str) -> str:
    """Delta_T of every method at every sparsity; the best of each column in bold."""
    rows = [row for row in rows if row.problem == problem and row.delta is not None]
    sparsities = sorted({row.sparsity for row in rows})
    best = {s: max(_mean(row) for row in rows if row.sparsity == s) for s in sparsities}
    body = []
    for method in _methods(rows):
        cells = [method]
        for s in sparsities:
            own = next((r for r in rows if (r.method, r.sparsity) == (method, s)), None)
            cells.append(_delta(own, bold=own is not None and _mean(own) == best[s]))
        body.append(cells)
    return _table(["Delta_T, %", *(_percent(s) for s in sparsities)], body)


def overview_table(rows: Iterable[Row], sparsity: float) -> str:
    """Delta_T of every method on every problem, at one sparsity; the best of each in bold."""
    rows = [row for row in rows if row.delta is not None and row.sparsity == sparsity]
    problems = list(dict.fromkeys(row.problem for row in rows))
    best = {name: max(_mean(row) for row in rows if row.problem == name) for name in problems}
    body = []
    for method in _methods(rows):
        own = {row.problem: row for row in rows if row.method == method}
        cells = [_delta(own.get(p), p in own and _mean(own[p]) == best[p]) for p in problems]
        body.append([method, *cells])
    return _table([f"Delta_T, % at {_percent(sparsity)}", *problems], body)


def margin_table(rows: Sequence[Row], method: str = OURS) -> str:
    """How far a method is above the best baseline (named), by problem and sparsity."""
    sparsities = sorted({row.sparsity for row in rows if row.delta is not None})
    body = []
    for problem in dict.fromkeys(row.problem for row in rows):
        cells = [problem]
        for s in sparsities:
            found = margin(rows, method, BASELINES, problem=problem, sparsity=s)
            cells.append(f"{found.ahead.format('+.2f')} ({found.rival})" if found else "")
        body.append(cells)
    return _table([f"{method} - best baseline", *(_percent(s) for s in sparsities)], body)


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
    for row in rows:
        if row.delta is None:
            continue
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
    hours = sum(run["seconds"] for run in runs) / 3600
    seeds = sorted({run["seed"] for run in runs})
    parts = [f"{len(runs)} runs, {hours:.1f} hours of training in all; seeds {seeds}"]
    for key in ("device", "threads"):
        parts.append(f"{key} {', '.join(sorted({str(run[key]) for run in runs}))}")
    for name in runs[0]["versions"] if runs else ():
        parts.append(f"{name} {', '.join(sorted({run['versions'][name] for run in runs}))}")
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
        return f"{found[1]}\n\n{blocks[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(?ms)^(<!-- ([^\n]+) -->)$.*?^<!-- end -->$", replace, page)


def _at(rows: Iterable[Row], problem: str, sparsity: float) -> list[Row]:
    own = [row for row in rows if row.problem == problem]
    own = [row for row in own if row.method == DENSE or row.sparsity == sparsity]
    order = _methods(own)
    return sorted(own, key=lambda row: order.index(row.method))


def _methods(rows: Iterable[Row]) -> list[str]:
    """The methods: dense, the baselines, ours and its variants, as the harness lists them."""
    from torch_adapmtl.benchmark.methods import METHODS

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
    return f"**{text}**" if bold else text


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _zeros(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}"


def _metric(estimate: Estimate) -> str:
    return estimate.format(".2f" if abs(estimate.mean) >= 1 else ".4f")


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])
