"""Train every method on every problem, and write a line of JSON for each run.

    python examples/benchmark.py --problems digits --methods dense AdapMTL Taylor --sparsities 0.9
    python examples/benchmark.py --quick      # three runs of a few steps, to see that it runs

A run that is in the file already is not run again, so that a study can be stopped and resumed.
"""

from __future__ import annotations

import argparse

from torch_adapmtl.benchmark import METHODS, PROBLEMS, read, study


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS], default=[*PROBLEMS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.97])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="docs/results/cpu.jsonl", help="file of lines to add to")
    parser.add_argument("--steps", type=int, help="in place of each problem's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="three runs of a few steps")
    args = parser.parse_args()
    if args.quick:
        args.problems, args.methods = ["digits"], ["dense", "AdapMTL", "Taylor"]
        args.sparsities, args.seeds, args.steps = [0.9], [0], 3
    study(
        problems=args.problems,
        methods=args.methods,
        sparsities=args.sparsities,
        seeds=args.seeds,
        out=args.out,
        steps=args.steps,
        jobs=args.jobs,
        device=args.device,
    )
    print(f"{len(read(args.out))} runs in {args.out}")


if __name__ == "__main__":
    main()
