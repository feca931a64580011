"""Draw every picture of `torch_adapmtl.plots`: of one short run, and of networks measured before.

The network of the quickstart is pruned to 90 % on pairs of digits. The trade-off is drawn from what
`examples/tradeoff.py` has measured.

    python -m examples.pictures --output docs/assets    # about a minute
    python -m examples.pictures --quick                 # some seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.quickstart import make_model, train
from torch_adapmtl import apply_adapmtl, plots
from torch_adapmtl.datasets import MultiDigits

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "assets" / "tradeoff.jsonl"
CHANNELS = (32, 64, 128, 256)


def tradeoff_rows() -> list[dict[str, Any]]:
    """A row for each network of the trade-off: means over the seeds, and its nonzero weights."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in MEASURED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["net"], []).append(row)
    return [
        {
            **described(net),
            "delta": fmean(row["delta"] for row in rows),
            "ms": fmean(row["ms"]["16"] for row in rows),
        }
        for net, rows in found.items()
    ]


def described(net: str) -> dict[str, Any]:
    """Name and group of a network, and its nonzero weights where its name says how many."""
    if net.startswith("dense"):
        share = float(net.split()[1]) / 100 if "," in net else 1.0
        sizes = [p.numel() for p in make_model(0, [int(share * c) for c in CHANNELS]).parameters()]
        return {"name": f"{100 * share:g} %", "group": "dense: channels", "left": sum(sizes)}
    zeros, _, _, _, counted = net.split()
    name = f"{zeros} %"
    if counted == "macs":
        return {"name": name, "group": "pruned: saved multiply-adds"}
    parameters = list(make_model(0).parameters())
    prunable = sum(p.numel() for p in parameters if p.ndim > 1)
    left = sum(p.numel() for p in parameters) - float(zeros) / 100 * prunable
    return {"name": name, "group": "pruned: zero weights", "left": left}


def main() -> None:
    """Train, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="a few steps, on little data")
    args = parser.parse_args()
    steps, examples = (10, 1_000) if args.quick else (args.steps, 10_000)

    model = make_model(0)
    pruner = apply_adapmtl(model, target_sparsity=0.9, total_steps=steps, weighting="stability")
    train(model, MultiDigits("train", size=examples), steps, 0, pruner)

    figures = {
        "sparsity": plots.plot_sparsity(pruner.history),
        "task-weights": plots.plot_task_weights(pruner.history),
        "allocation": plots.plot_allocation(pruner.report()),
        "tradeoff": plots.plot_tradeoff(
            tradeoff_rows(),
            x={"ms": "time for 16 images (ms)", "left": "weights that are not zero"},
            y={"delta": "relative performance (%)"},
        ),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = args.output / f"plot-{name}.png"
        figure.savefig(path, dpi=200)
        print(f"{path}")


if __name__ == "__main__":
    main()
