"""Fill the tables of the results page and of the README from the lines of the studies.

    python examples/report.py                       # from docs/results/*.jsonl
    python examples/report.py --figures             # the page's figures too
    python examples/report.py --lines my.jsonl      # print the tables of other lines

The blocks of a page, between `<!-- NAME -->` and `<!-- end -->`, are replaced; its text is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch_adapmtl.benchmark import (
    BASELINES,
    DENSE,
    PROBLEMS,
    TEACHERS,
    Row,
    allocation_figure,
    delta_table,
    fill,
    margin_table,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    provenance,
    read,
    summarize,
    tradeoff_figure,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results"
PAGES = (FOLDER.with_suffix(".md"), ROOT / "README.md")
# How far AdapMTL should be ahead of the best baseline, in points, by sparsity.
AIMS = {0.8: 0.0, 0.9: 2.0, 0.95: 0.0, 0.97: 5.0}
DRAWN = (
    *("AdapMTL", "Taylor", "IMP", "SNIP", "global magnitude"),
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


def details(rows: Sequence[Row], sparsity: float) -> str:
    """Every problem's tables of the paper's form at one sparsity, folded."""
    parts = []
    for name in problems(rows):
        if all(row.sparsity != sparsity for row in rows if row.problem == name):
            continue
        both = paper_table(rows, name, sparsity) + "\n\n" + metric_tables(rows, name, sparsity)
        indented = "\n".join(f"    {line}".rstrip() for line in both.split("\n"))
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


def draw(rows: Sequence[Row]) -> None:
    """Write the page's figures."""
    figures = {"tradeoff.png": tradeoff_figure(rows, DRAWN)}
    for sparsity in (0.9, 0.97):
        own = [row for row in rows if row.method in DRAWN]
        figures[f"allocation{100 * sparsity:g}.png"] = allocation_figure(own, sparsity, DRAWN)
    for name, figure in figures.items():
        figure.savefig(FOLDER / name, dpi=120)


def main() -> None:
    """Fill the pages, or print the tables of a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lines", type=Path, help="print the tables of this file instead")
    parser.add_argument("--figures", action="store_true", help="draw the page's figures too")
    parser.add_argument("--quick", action="store_true", help="print tables of few committed lines")
    args = parser.parse_args()
    if args.quick:
        args.lines = FOLDER / "sensitivities.jsonl"
    if args.lines:
        rows = in_order(read(args.lines))
        if not rows:
            parser.error(
                f"--lines {args.lines}: no runs there that can be compared with dense ones"
            )
        print(sections(rows, lambda name: delta_table(rows, name), level="##"))
        print(
            f"\n{margin_table(rows, AIMS)}" if any(row.method in BASELINES for row in rows) else ""
        )
        return
    lines = committed()
    made = blocks(lines)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    if args.figures:
        draw(in_order(lines["comparison"]))
    print(f"{sum(map(len, lines.values()))} runs")


if __name__ == "__main__":
    main()
