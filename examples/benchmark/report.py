"""Fill the tables of the results page and of the README from the lines of the studies.

    python -m examples.benchmark.report                     # from docs/results/*.jsonl
    python -m examples.benchmark.report --figures           # the page's figures too
    python -m examples.benchmark.report --lines my.jsonl    # print the tables of other lines; with
                                                            # --figures, figures beside them

The blocks of a page, between `<!-- NAME -->` and `<!-- end -->`, are replaced; its text is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.benchmark.figures import allocation_figure, tradeoff_figure
from examples.benchmark.lines import read
from examples.benchmark.methods import BASELINES, DENSE, OURS
from examples.benchmark.problems import PROBLEMS
from examples.benchmark.studies import ROOT
from examples.benchmark.summary import Row, summarize
from examples.benchmark.synthetic import TEACHERS
from examples.benchmark.tables import (
    delta_table,
    fill,
    margin_table,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    provenance,
)

FOLDER = ROOT / "docs" / "results"
PAGES = (FOLDER.with_suffix(".md"), ROOT / "README.md")
# How far the default method should be ahead of the best baseline, in points, by sparsity.
AIMS = {0.8: 0.0, 0.9: 2.0, 0.95: 0.0, 0.97: 5.0}
DRAWN = (
    *(OURS, "Taylor", "IMP", "SNIP", "global magnitude"),
    *("DiSparse dynamic", "uniform magnitude"),
)


def in_order(lines: Sequence[dict[str, Any]]) -> list[Row]:
    """What the lines say, by problem: lines are in the order in which runs happened to end."""
    order = list(PROBLEMS)
    return sorted(
        summarize(lines),
        key=lambda row: order.index(row.problem) if row.problem in order else len(order),
    )


def problems(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.problem for row in rows))


def sections(rows: Sequence[Row], table: Callable[[str], str], level: str = "###") -> str:
    """One table for each problem, under its name."""
    return "\n\n".join(f"{level} {name}\n\n{table(name)}" for name in problems(rows))


def paper_form(rows: Sequence[Row], problem: str, sparsity: float) -> str:
    return paper_table(rows, problem, sparsity) + "\n\n" + metric_tables(rows, problem, sparsity)


def details(rows: Sequence[Row], sparsity: float) -> str:
    """Every problem's tables of the paper's form at one sparsity, folded."""
    parts = []
    for name in problems(rows):
        if all(row.sparsity != sparsity for row in rows if row.problem == name):
            continue
        tables = paper_form(rows, name, sparsity).split("\n")
        indented = "\n".join(f"    {line}".rstrip() for line in tables)
        parts.append(f'??? note "{name}, {100 * sparsity:g} %"\n\n{indented}')
    return "\n\n".join(parts)


def blocks(lines: dict[str, list[dict[str, Any]]]) -> dict[str, Callable[[], str]]:
    """What makes each block of the page; `lines` by the name of their file."""
    rows = {name: in_order(own) for name, own in lines.items()}
    made: dict[str, Callable[[], str]] = {}
    for study, own in rows.items():
        made[f"{study}: runs"] = lambda study=study: provenance(lines[study])
        made[f"{study}: delta"] = lambda own=own: sections(own, lambda name: delta_table(own, name))
        made[f"{study}: margin"] = lambda own=own: margin_table(own, AIMS)
        made[f"{study}: order"] = lambda own=own: order_table(own, list(TEACHERS))
        for sparsity in sorted({row.sparsity for row in own if row.method != DENSE}):
            at = f"at {100 * sparsity:g} %"
            made[f"{study}: details {at}"] = lambda own=own, s=sparsity: details(own, s)
            made[f"{study}: {at}"] = lambda own=own, s=sparsity: overview_table(own, s)
    return made


def committed() -> dict[str, list[dict[str, Any]]]:
    """The lines of every file, by its name."""
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.jsonl"))}


def draw(
    rows: Sequence[Row], methods: Sequence[str], sparsities: Sequence[float], folder: Path
) -> None:
    """Write trade-off curves, and the allocations at some sparsities."""
    figures = {"tradeoff.png": tradeoff_figure(rows, methods)}
    for sparsity in sparsities:
        own = [row for row in rows if row.method in methods]
        figures[f"allocation{100 * sparsity:g}.png"] = allocation_figure(own, sparsity, methods)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)


def show(rows: Sequence[Row]) -> str:
    """All tables of a file of lines."""
    sparse = [row for row in rows if row.delta is not None]
    parts = [sections(sparse, lambda name: delta_table(rows, name), level="##")]
    if any(row.method in BASELINES for row in sparse):
        parts.append(margin_table(rows, AIMS))
    for sparsity in sorted({row.sparsity for row in sparse}):
        for name in problems([row for row in sparse if row.sparsity == sparsity]):
            parts.append(f"## {name}, {100 * sparsity:g} %\n\n{paper_form(rows, name, sparsity)}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the pages, or print the tables of a file."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--lines", type=Path, help="print the tables of this file instead")
    parser.add_argument("--figures", action="store_true", help="draw the page's figures too")
    args = parser.parse_args(argv)
    if args.lines:
        if not args.lines.is_file():
            parser.error(f"--lines {args.lines}: there is no such file")
        rows = in_order(read(args.lines))
        methods = list(dict.fromkeys(row.method for row in rows if row.method != DENSE))
        if not methods:
            parser.error(
                f"--lines {args.lines}: no runs there that can be compared with dense ones"
            )
        print(show(rows))
        if args.figures:
            found = sorted({row.sparsity for row in rows if row.method != DENSE})
            draw(rows, methods, found, args.lines.parent)
        return
    lines = committed()
    made = blocks(lines)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    if args.figures:
        draw(in_order(lines["comparison"]), DRAWN, (0.9, 0.97), FOLDER)
    print(f"{sum(map(len, lines.values()))} runs")


if __name__ == "__main__":
    main()
