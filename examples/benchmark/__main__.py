"""Train the methods on the problems, and write one line of JSON for each run.

    python -m examples.benchmark --study choosing --jobs 2      # a study of the results page
    python -m examples.benchmark --problems digits --methods dense "adaptive (ours)" Taylor
    python -m examples.benchmark --preset paper --data rooms    # the paper's networks, on a GPU
    python -m examples.benchmark --quick    # three runs of a few steps, to see that it works

Without --study, --preset or --problems it runs the study of the choosing half, which takes hours. A
run that is in the file already is not repeated, so a study can be stopped and resumed. The studies
of the reported half are run once for each release of the defaults: they refuse to add to lines of
other defaults.
`python -m examples.benchmark.report` makes tables and figures of the lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import torch_adapmtl
from examples.benchmark.lines import read
from examples.benchmark.methods import DENSE, METHODS, OURS
from examples.benchmark.paper_scale import ENCODERS
from examples.benchmark.problems import PROBLEMS
from examples.benchmark.studies import REPORTED_FILES, ROOT, STUDIES, check_release, study
from torch_adapmtl import Adaptive

_PROG = "python -m examples.benchmark"
_NAMES = "\n".join(
    [
        "problems (quote those with spaces), or paper/ENCODER/DATA:",
        *(f"  {name}" for name in PROBLEMS),
        "methods:",
        *(f"  {name}" for name in METHODS),
    ]
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and choose device and precision where it does not."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        epilog=_NAMES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--study", choices=STUDIES, help="a whole study of the results page")
    parser.add_argument(
        "--preset",
        choices=("cpu", "paper"),
        default="cpu",
        help="cpu: small networks, a minute or two a run;\npaper: the paper's networks, on a GPU",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        help="for --preset paper: rooms (default), or folders with NYU-v2 or Tiny-Taskonomy",
    )
    parser.add_argument("--problems", nargs="+", metavar="PROBLEM", help="default: the preset's")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: the study's")
    parser.add_argument("--sparsities", nargs="+", type=float, help="fractions, such as 0.9")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="default: the study's, mostly 3 4 5; the library's defaults were chosen with 0 to 2",
    )
    parser.add_argument("--out", help="file to which lines are added")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the problem's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", help="default: cuda for the paper preset, else cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16; default: only for the paper preset",
    )
    parser.add_argument("--quick", action="store_true", help="three runs of a few steps")
    args = parser.parse_args(argv)
    if args.study and args.preset == "paper":
        parser.error("--preset paper chooses its own problems: leave out --study")
    if args.data and args.preset != "paper":
        parser.error("--data needs the paper's networks: add --preset paper")
    if args.bf16 is None:
        args.bf16 = _paper_scale(args)
    if args.device is None:
        args.device = "cuda" if _paper_scale(args) else "cpu"
        if _paper_scale(args) and not torch.cuda.is_available():
            parser.error("the paper preset needs a GPU, and torch finds none: add --device cpu")
    return args


def _paper_scale(args: argparse.Namespace) -> bool:
    return "paper" in (args.preset, args.study)


def chosen_runs(args: argparse.Namespace) -> dict[str, Any]:
    """Problems, methods, sparsities, seeds and file: the study's, unless options replace them."""
    chosen = dict(STUDIES[args.study or ("paper" if args.preset == "paper" else "choosing")])
    chosen["out"] = str(ROOT / chosen["out"])
    if args.preset == "paper":
        chosen["problems"] = [
            f"paper/{encoder}/{data}" for data in args.data or ["rooms"] for encoder in ENCODERS
        ]
    if args.quick:
        chosen.update(problems=["digits"], methods=[DENSE, OURS, "Taylor"], sparsities=[0.9])
        chosen["seeds"], args.steps = [0], 3
    replaced = {
        name: value
        for name in ("problems", "methods", "sparsities", "seeds", "out")
        if (value := getattr(args, name)) is not None
    }
    # Only runs as the results page has them go into its files.
    device = "cuda" if _paper_scale(args) else "cpu"
    usual = args.device == device and args.bf16 == _paper_scale(args) and args.steps is None
    if not (args.study and usual) or args.quick or "problems" in replaced:
        chosen["out"] = "runs.jsonl"
    return {**chosen, **replaced}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing."""
    args = arguments(argv)
    chosen = chosen_runs(args)
    try:
        if chosen["out"] in {str(ROOT / name) for name in REPORTED_FILES}:
            check_release(read(chosen["out"]), chosen["out"])
            print(
                "The reported half, which is run once for each release of the defaults: "
                f"torch_adapmtl {torch_adapmtl.__version__}, {Adaptive().config()}",
                flush=True,
            )
        study(
            **chosen,
            steps=args.steps,
            jobs=args.jobs,
            device=args.device,
            bf16=args.bf16,
        )
    except (
        ValueError,
        FileNotFoundError,
        RuntimeError,
    ) as error:  # errors of runs are in their lines
        raise SystemExit(f"{_PROG}: {error}") from None
    print(f"{len(read(chosen['out']))} runs in {chosen['out']}")


if __name__ == "__main__":
    main()
