"""Accuracy against latency on a CPU: sparse nets, and narrower dense ones.

The network of the quickstart is trained on pairs of digits: dense, with fewer channels, and pruned
to several sparsities, counted in weights and in multiply-adds. All are trained alike. Then all of
them run in turn in one process, on one thread: the sparse ones accelerated, the dense ones in the
fastest of three ways: as they are, in channels-last format, with batch norms folded.

    python -m examples.tradeoff --folder tradeoff --output tradeoff.jsonl

Trained networks are kept in the folder, so that the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.quickstart import evaluate, make_model, predict, train
from torch_adapmtl import accelerate, apply_adapmtl, relative_performance
from torch_adapmtl.datasets import MultiDigits

CHANNELS = (32, 64, 128, 256)
NETS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{f"dense, {100 * w:g} % of the channels": {"width": w} for w in (0.75, 0.5, 0.375, 0.25)},
    **{
        f"{100 * s:g} % of the {count}": {"sparsity": s, "count": count}
        for count, sparsities in (
            ("weights", (0.8, 0.9, 0.95, 0.97)),
            ("macs", (0.7, 0.8, 0.9, 0.95)),
        )
        for s in sparsities
    },
}


def build(name: str, seed: int) -> nn.Module:
    """The network before training."""
    width = NETS[name].get("width", 1)
    return make_model(seed, [int(width * channels) for channels in CHANNELS])


def trained(name: str, seed: int, steps: int, size: int, folder: Path) -> nn.Module:
    """The network, trained on so many images, from the folder if it is there."""
    model, path = build(name, seed), folder / f"{name.replace(' ', '_')}-{seed}-{steps}.pt"
    if not path.exists():
        settings, pruner = NETS[name], None
        if "sparsity" in settings:
            pruner = apply_adapmtl(
                model,
                target_sparsity=settings["sparsity"],
                total_steps=steps,
                count=settings["count"],
            )
        train(model, MultiDigits("train", size=size), steps, seed, pruner)
        if pruner:
            pruner.finalize()
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def ways(name: str, model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """How the network is run."""
    if "sparsity" in NETS[name]:
        fast = accelerate(model, x)
        return {"accelerated": lambda: fast(x)}
    fused = accelerate(model, x, choices=dict.fromkeys(accelerate(model, x).choices, "dense"))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    return {"as it is": lambda: model(x), "folded": lambda: fused(x), "last": lambda: last(x_last)}


@torch.no_grad()
def measure(models: dict[str, nn.Module], x: Tensor, runs: int) -> dict[str, float]:
    """Milliseconds of each network, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    functions = {
        (name, way): function
        for name, model in models.items()
        for way, function in ways(name, model, x).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    for _ in range(runs):
        for key, function in functions.items():
            begin = time.process_time()
            function()
            times[key].append(1e3 * (time.process_time() - begin))
    torch.set_num_threads(before)
    best: dict[str, float] = {}
    for (name, _), values in times.items():
        best[name] = min(best.get(name, float("inf")), statistics.median(values))
    return best


def main() -> None:
    """Train, measure, and write a line for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--runs", type=int, default=51)
    parser.add_argument("--folder", default="tradeoff", help="where trained networks are kept")
    parser.add_argument("--output", help="a file of JSON lines to append to")
    parser.add_argument("--quick", action="store_true", help="two nets, two steps, little data")
    args = parser.parse_args()
    names, sizes = list(NETS), (10_000, 2_000)
    if args.quick:
        names, sizes = ["dense", "90 % of the weights"], (64, 64)
        args.steps, args.batches, args.runs = 2, [1], 1
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, targets = MultiDigits("test", size=sizes[1]).tensors()
    for seed in args.seeds:
        models = {name: trained(name, seed, args.steps, sizes[0], folder) for name in names}
        metrics = {name: evaluate(predict(m, images), targets) for name, m in models.items()}
        latency = {n: measure(models, images[:n], args.runs) for n in args.batches}
        for name in names:
            relative = relative_performance(
                metrics[name], metrics["dense"], lower_is_better=["mean error (%)"]
            )
            line = {
                "net": name,
                "seed": seed,
                "steps": args.steps,
                "delta": round(relative.delta, 3),
                "ms": {str(n): round(latency[n][name], 3) for n in args.batches},
                "metrics": metrics[name],
                "torch": torch.__version__,
            }
            print(f"{name:32} {relative.delta:+7.2f} % {line['ms']}", flush=True)
            if args.output:
                with Path(args.output).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
