"""Train to a budget of multiply-adds, and to the weight budget that leaves as many.

    python -m examples.benchmark.macs            # the runs that are missing, then the table
    python -m examples.benchmark.macs --table    # the table alone

Each run is a line of docs/results/macs.jsonl; a run that is in the file is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.benchmark.lines import read
from examples.benchmark.methods import DENSE, MACS, OURS
from examples.benchmark.studies import ROOT, study
from examples.benchmark.summary import Estimate, Row, summarize

__all__ = ["equal_work_table", "main"]

FILE = ROOT / "docs" / "results" / "macs.jsonl"
#: The shares of the multiply-adds that are to be left.
LEFT = (0.1, 0.2)
#: By problem the sparsities of the weight budget that leave these shares: those at which a run of
#: seed 0 to a budget of multiply-adds, with the same allocation (`position_power=0`), ended.
WEIGHTS: Mapping[str, Sequence[float]] = {
    "digits": (0.974, 0.941),
    "digits convnext": (0.972, 0.933),
    "words": (0.889, 0.787),
}
SEEDS = (3, 4, 5)


def equal_work_table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Delta_T beside the multiply-adds and the weights that are left, by problem and method.

    Args:
        lines: The runs, as `read` returns them.

    Example:
        >>> print(equal_work_table([]))
        | problem | method | multiply-adds left, % | weights left, % | Delta_T, % |
        |:--|:--|--:|--:|--:|
    """
    lines = list(lines)
    table = [
        "| problem | method | multiply-adds left, % | weights left, % | Delta_T, % |",
        "|:--|:--|--:|--:|--:|",
    ]
    rows = [row for row in summarize(lines) if row.delta is not None]
    left = {id(row): _left(row, lines) for row in rows}
    rows.sort(key=lambda row: (row.problem, -round(left[id(row)].mean, 1), row.method))
    for row in rows:
        weights = 100 * (1 - row.reached.mean)
        table.append(
            f"| {row.problem} | {row.method} | {left[id(row)].format('.1f')} | {weights:.1f} | "
            f"{row.delta.format('+.1f') if row.delta else ''} |"
        )
    return "\n".join(table)


def _left(row: Row, lines: Iterable[Mapping[str, Any]]) -> Estimate:
    """The share of the multiply-adds that the runs of a row left, in percent."""
    return Estimate.of(
        [
            100 * line["macs_left"]
            for line in lines
            if (line["problem"], line["method"], line["sparsity"])
            == (row.problem, row.method, row.sparsity)
            and line["seed"] in row.seeds
            and "failed" not in line
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the problem's")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", default=str(FILE), help="file to which lines are added")
    args = parser.parse_args(argv)
    for seed in () if args.table else args.seeds:
        for problem, sparsities in WEIGHTS.items():
            common: Any = {"problems": [problem], "seeds": [seed], "out": args.out}
            common["steps"] = args.steps
            targets = [1 - left for left in LEFT]
            study(methods=[DENSE, *MACS], sparsities=targets[:1], **common)
            study(methods=[OURS], sparsities=sparsities, **common)
    print(equal_work_table(read(args.out)))


if __name__ == "__main__":
    main()
