"""Train every method on every problem, and write a line of JSON for each run.

    python examples/benchmark.py --study comparison --jobs 2        # what the results page shows
    python examples/benchmark.py --problems digits --methods dense AdapMTL Taylor --sparsities 0.9
    python examples/benchmark.py --preset paper --data rooms      # the paper's nets, on a GPU
    python examples/benchmark.py --quick      # three runs of a few steps, to see that it runs

Without --study, --preset or --problems it is the whole comparison, which takes hours. A run that is
in the file already is not run again, so that a study can be stopped and resumed.
`examples/report.py` makes tables and figures of the lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from examples.benchmark import (
    ENCODERS,
    METHODS,
    PROBLEMS,
    STUDIES,
    read,
    study,
)

ROOT = Path(__file__).resolve().parent.parent
NAMES = "\n".join(
    [
        "problems (quote those with spaces), or paper/ENCODER/DATA:",
        *(f"  {name}" for name in PROBLEMS),
        "methods:",
        *(f"  {name}" for name in METHODS),
    ]
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NAMES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--study", choices=STUDIES, help="one of the results page's, as a whole")
    parser.add_argument(
        "--preset",
        choices=("cpu", "paper"),
        default="cpu",
        help="cpu: small nets, a minute or two a run; paper: the paper's nets, on a GPU",
    )
    parser.add_argument(
        "--data", nargs="+", help="of the paper preset: rooms (the default) or folders"
    )
    parser.add_argument("--problems", nargs="+", metavar="PROBLEM", help="in place of the preset's")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="in place of all")
    parser.add_argument("--sparsities", nargs="+", type=float, help="fractions, such as 0.9")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[3, 4, 5], help="0 and 1 chose the defaults"
    )
    parser.add_argument("--out", help="file of lines to add to")
    parser.add_argument("--steps", type=int, help="in place of each problem's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", help="cuda for the paper preset, else cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16, as the paper preset does",
    )
    parser.add_argument("--quick", action="store_true", help="three runs of a few steps")
    args = parser.parse_args()
    if args.study and args.preset == "paper":
        parser.error("--preset paper has problems of its own: leave out --study")
    if args.data and args.preset != "paper":
        parser.error("--data is of the paper's nets: add --preset paper")
    if args.bf16 is None:
        args.bf16 = paper(args)
    if args.device is None:
        args.device = "cuda" if paper(args) else "cpu"
        if paper(args) and not torch.cuda.is_available():
            parser.error("the paper preset is for a GPU, and torch sees none: say --device cpu")
    return args


def paper(args: argparse.Namespace) -> bool:
    """Whether the paper's nets are wanted."""
    return "paper" in (args.preset, args.study)


def wanted(args: argparse.Namespace) -> dict[str, Any]:
    """Which runs: the study's or the preset's, but for what is given."""
    chosen = dict(STUDIES[args.study or ("paper" if args.preset == "paper" else "comparison")])
    chosen["out"] = str(ROOT / chosen["out"])
    if args.preset == "paper":
        folders = args.data or ["rooms"]
        chosen["problems"] = [f"paper/{e}/{data}" for data in folders for e in ENCODERS]
    if args.quick:
        chosen.update(problems=["digits"], methods=["dense", "AdapMTL", "Taylor"], sparsities=[0.9])
        args.seeds, args.steps = [0], 3
    given = {name: getattr(args, name) for name in ("problems", "methods", "sparsities", "out")}
    given = {name: value for name, value in given.items() if value is not None}
    own = args.device == ("cuda" if paper(args) else "cpu") and args.bf16 == paper(args)
    if args.quick or args.steps is not None or not (args.study and own) or "problems" in given:
        chosen["out"] = "runs.jsonl"  # the results page is made of whole studies
    return {**chosen, **given}


def main() -> None:
    """Run what is missing."""
    args = arguments()
    chosen = wanted(args)
    try:
        study(
            **chosen,
            seeds=args.seeds,
            steps=args.steps,
            jobs=args.jobs,
            device=args.device,
            bf16=args.bf16,
        )
    except (ValueError, FileNotFoundError, RuntimeError) as error:  # a run's are in its line
        raise SystemExit(f"benchmark.py: {error}") from None
    print(f"{len(read(chosen['out']))} runs in {chosen['out']}")


if __name__ == "__main__":
    main()
