"""Train to a budget of multiply-adds, and to the weight budget that leaves as many.

    python -m examples.benchmark.macs            # the runs that are missing, then the table
    python -m examples.benchmark.macs --table    # the table alone

Each run is a line of docs/results/macs.jsonl, or of macs.jsonl with other --steps; a run that is in
the file is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.benchmark.lines import read
from examples.benchmark.methods import DENSE, MACS, OURS
from examples.benchmark.studies import ROOT, study
from examples.benchmark.summary import Estimate, summarize

__all__ = ["equal_work_table", "main"]

FILE = ROOT / "docs" / "results" / "macs.jsonl"
#: The shares of the multiply-adds that are to be left: by both budgets, and by that of weights.
LEFT = (0.1, 0.2)
#: By problem the sparsities of the weight budget that leave about these shares, found by trial.
WEIGHTS: Mapping[str, Sequence[float]] = {
    "digits": (0.976, 0.94),
    "digits convnext": (0.969, 0.926),
    "words": (0.892, 0.796),
    "rooms3": (0.928, 0.85),
}
SEEDS = (3, 4, 5)


def equal_work_table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Delta_T beside the shares of the multiply-adds and of the weights that are left.

    Args:
        lines: The runs, as `read` returns them.

    Example:
        >>> print(equal_work_table([]))
        | problem | method | multiply-adds left, % | weights left, % | Delta_T, % |
        | --- | --- | ---: | ---: | ---: |
    """
    lines = [line for line in lines if "failed" not in line]
    table = [
        "| problem | method | multiply-adds left, % | weights left, % | Delta_T, % |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    found = []
    for row in summarize(lines):
        if row.delta is None:
            continue
        wanted = (row.problem, row.method, row.sparsity)
        own = [
            line
            for line in lines
            if (line["problem"], line["method"], line["sparsity"]) == wanted
            and line["seed"] in row.seeds
        ]
        left = Estimate.of([100 * line["macs_left"] for line in own])
        weights = Estimate.of([100 * (1 - line["zeros"] / line["weights"]) for line in own])
        text = (f"{left.mean:.1f}", f"{weights.mean:.1f}", row.delta.format("+.1f"))
        found.append(((row.problem, -round(left.mean), row.method), text))
    for (problem, _, method), text in sorted(found):
        table.append(f"| {problem} | {method} | {' | '.join(text)} |")
    return "\n".join(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the problem's")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", help="file to which lines are added")
    args = parser.parse_args(argv)
    # Only runs as the results page has them go into its file.
    args.out = args.out or (str(FILE) if args.steps is None else "macs.jsonl")
    for seed in () if args.table else args.seeds:
        for problem, sparsities in WEIGHTS.items():
            common: Any = {"problems": [problem], "seeds": [seed], "out": args.out}
            common["steps"] = args.steps
            study(methods=[DENSE, MACS], sparsities=[1 - LEFT[0]], **common)
            study(methods=[OURS], sparsities=sparsities, **common)
    print(equal_work_table(read(args.out)))


if __name__ == "__main__":
    main()
