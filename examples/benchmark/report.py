"""Fill the tables of the results page and of the README from the lines of the studies.

    python -m examples.benchmark.report                     # from docs/results/*.jsonl
    python -m examples.benchmark.report --figures           # draw the page's figures too
    python -m examples.benchmark.report --tables DIR        # write all tables, a page for each file
    python -m examples.benchmark.report --lines my.jsonl    # print all tables of your own lines, or
                                                            # write them (--tables), and draw them

The last two leave the pages as they are. Of a page, only the blocks between `<!-- NAME -->` and
`<!-- end -->` are replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.benchmark.figures import allocation_figure, tradeoff_figure
from examples.benchmark.lines import provenance, read
from examples.benchmark.macs import equal_work_table
from examples.benchmark.methods import BASELINES, DENSE, METHODS, OURS, PUBLISHED
from examples.benchmark.page import fill
from examples.benchmark.problems import PROBLEMS
from examples.benchmark.problems.tables import TEACHERS
from examples.benchmark.studies import ABLATION, ROOT, STUDIES
from examples.benchmark.summary import Row, summarize
from examples.benchmark.tables import (
    better_table,
    delta_table,
    difference_table,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    rank_table,
    suite_table,
    weighting_table,
)

FOLDER = ROOT / "docs" / "results"
PAGES = (FOLDER.with_suffix(".md"), ROOT / "docs" / "results-details.md", ROOT / "README.md")
SPARSITIES = (0.9, 0.95, 0.98)
ENDS = (0.9, 0.98)  # the sparsities of the half to choose on
# What the page's figure shows.
DRAWN = (OURS, PUBLISHED, "Taylor", "ST-3", "Feather", "RigL", "IMP", "global magnitude")

Lines = Sequence[Mapping[str, Any]]


def ordered_rows(lines: Lines) -> list[Row]:
    """Summarize lines, in the order of `PROBLEMS`; runs end in no particular order."""
    order = list(PROBLEMS)
    return sorted(
        summarize(lines),
        key=lambda row: order.index(row.problem) if row.problem in order else len(order),
    )


def blocks(lines: Mapping[str, Lines]) -> dict[str, Callable[[], str]]:
    """What makes each block of the pages, from lines by the name of their file."""
    reported, weighting, choosing = (
        ordered_rows(lines.get(name, ())) for name in ("reported", "weighting", "choosing")
    )
    shown = (*BASELINES, OURS, PUBLISHED)

    def overview(rows: Sequence[Row], sparsity: float) -> Callable[[], str]:
        return lambda: overview_table([row for row in rows if row.method in shown], sparsity)

    return {
        "runs": lambda: _overall(lines),
        "reported: margin": lambda: suite_table(reported, SPARSITIES),
        "reported: ranks": lambda: rank_table(reported, SPARSITIES),
        "reported: better": lambda: better_table(reported, SPARSITIES),
        "choosing: margin": lambda: suite_table(choosing, ENDS),
        "choosing: ranks": lambda: rank_table(choosing, ENDS),
        **{f"reported: at {100 * s:g} %": overview(reported, s) for s in SPARSITIES},
        **{f"choosing: at {100 * s:g} %": overview(choosing, s) for s in ENDS},
        "weighting": lambda: weighting_table(weighting, 0.9),
        "ablation": lambda: difference_table(
            [row for row in choosing if row.problem in STUDIES["ablation"]["problems"]],
            ABLATION,
            ENDS,
        ),
        "macs": lambda: equal_work_table(lines.get("macs", ())),
    }


def _overall(lines: Mapping[str, Lines]) -> str:
    """What all studies of the page took together."""
    pages = ("reported", "weighting", "choosing", "macs")
    return provenance([run for name in pages for run in lines.get(name, ())])


def committed() -> dict[str, list[dict[str, Any]]]:
    """The lines of every file, by its name."""
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.jsonl"))}


def all_tables(name: str, lines: Lines) -> str:
    """All tables of a file of lines, as a page in Markdown."""
    rows = ordered_rows(lines)
    pruned = [row for row in rows if row.delta is not None]
    problems = list(dict.fromkeys(row.problem for row in pruned))
    sparsities = sorted({row.sparsity for row in pruned})
    parts = [f"# {name}", provenance(lines)]
    if any(row.method == OURS for row in pruned) and any(r.method in BASELINES for r in pruned):
        parts.append(suite_table(rows, sparsities))
    for sparsity in sparsities:
        parts += [f"## At {100 * sparsity:g} %", overview_table(rows, sparsity)]
        if any((row.method, row.sparsity) == (OURS, sparsity) for row in pruned):
            others = [method for method in METHODS if method not in (DENSE, OURS)]
            parts.append(difference_table(rows, others, (sparsity,)))
    for problem in problems:
        parts += [f"## {problem}", delta_table(rows, problem)]
        here = [row for row in pruned if row.problem == problem]
        if set(TEACHERS) <= {name for row in here for name in row.components}:
            parts.append(order_table(here, list(TEACHERS)))
        for sparsity in sorted({row.sparsity for row in here}):
            parts += [
                f"### {problem}, {100 * sparsity:g} %",
                paper_table(rows, problem, sparsity),
                metric_tables(rows, problem, sparsity),
            ]
    return "\n\n".join(parts) + "\n"


def draw(
    rows: Sequence[Row],
    curves: Sequence[str],
    bars: Sequence[str],
    sparsities: Sequence[float],
    folder: Path,
) -> None:
    """Write trade-off curves, and the allocations at some sparsities."""
    figures = {"tradeoff.png": tradeoff_figure(rows, curves)}
    for sparsity in sparsities:
        figures[f"allocation{100 * sparsity:g}.png"] = allocation_figure(rows, sparsity, bars)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)


def fill_pages(lines: Mapping[str, Lines]) -> None:
    """Fill the results page and the README."""
    made = blocks(lines)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the pages, or make all tables."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--lines", type=Path, metavar="FILE", help="lines of runs; default: the committed ones"
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="write all tables there")
    parser.add_argument(
        "--figures", action="store_true", help="draw figures, in DIR or beside the lines"
    )
    args = parser.parse_args(argv)
    if args.lines and not args.lines.is_file():
        parser.error(f"--lines {args.lines}: there is no such file")
    lines = {args.lines.stem: read(args.lines)} if args.lines else committed()
    rows = ordered_rows(lines.get(args.lines.stem if args.lines else "reported", ()))
    methods = list(dict.fromkeys(row.method for row in rows if row.delta is not None))
    if not methods:
        parser.error(
            f"{args.lines or FOLDER}: no run there can be compared with a dense run of its seed"
        )

    if args.tables:
        args.tables.mkdir(parents=True, exist_ok=True)
        for name in lines:
            page = all_tables(name, lines[name])
            (args.tables / f"{name}.md").write_text(page, encoding="utf-8")
    elif args.lines:
        print(all_tables(args.lines.stem, lines[args.lines.stem]))
    else:
        fill_pages(lines)
        print(f"{sum(map(len, lines.values()))} runs")

    if args.figures and args.lines:
        sparsities = sorted({row.sparsity for row in rows if row.delta is not None})
        draw(rows, methods, methods, sparsities, args.tables or args.lines.parent)
    elif args.figures:
        draw(rows, DRAWN, (), (), args.tables or FOLDER)


if __name__ == "__main__":
    main()
