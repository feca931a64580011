"""Prune a network that has been trained: how many steps, and which learning rate.

The network of the quickstart is trained dense for 1,000 steps. From there it is pruned to 90 % in
fewer steps and at lower learning rates, and, for comparison, from random weights. In the last lines
its heads are new, as after a transfer to other tasks: everything is trained at once, or the heads
alone at first.

    python -m examples.pretrained --seeds 0 1 2 --output pretrained.jsonl
    python -m examples.pretrained --table pretrained.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from examples.quickstart import BATCH, evaluate, make_model, predict, task_losses
from torch_adapmtl import Adaptive, SparsitySchedule, apply_adapmtl, relative_performance
from torch_adapmtl.datasets import MultiDigits

RATE = 2e-3  # of the dense training
DENSE_STEPS = 1000
#: By name, the settings that differ from: pruned, from the trained net, in 500 steps, at RATE.
ARMS: dict[str, dict[str, Any]] = {
    "random weights, 500 steps": {"start": "random"},
    "random weights, 1,500 steps": {"start": "random", "steps": 1500},
    **{
        f"trained, {steps} steps, {name} the rate": {"steps": steps, "rate": share * RATE}
        for steps in (125, 250, 500)
        for name, share in (("all of", 1.0), ("a third of", 1 / 3), ("a tenth of", 0.1))
    },
    "new heads": {"start": "new heads"},
    "new heads, alone for 100 steps": {
        "start": "new heads",
        "alone": 100,
        "schedule": SparsitySchedule(start=0.2),
    },
}


def train(
    model: nn.Module,
    data: MultiDigits,
    seed: int,
    *,
    steps: int,
    rate: float,
    sparsity: float | None,
    alone: int = 0,
    schedule: SparsitySchedule | None = None,
) -> None:
    """Train the model: pruned, or dense if `sparsity` is None; its heads alone at first."""
    images, targets = data.tensors()
    order = torch.Generator().manual_seed(seed)
    encoder = list(model.encoder.parameters())
    pruner = None
    if sparsity is not None:
        pruner = apply_adapmtl(
            model,
            target_sparsity=sparsity,
            total_steps=steps,
            method=Adaptive(schedule=schedule or SparsitySchedule()),
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in tqdm(range(steps), leave=False):
        for parameter in encoder:
            parameter.requires_grad_(step >= alone)
        rows = torch.randint(len(images), (BATCH,), generator=order)
        losses = task_losses(model(images[rows]), {task: t[rows] for task, t in targets.items()})
        total = pruner.loss(losses) if pruner else sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        cosine.step()
        if pruner:
            pruner.step()
    if pruner:
        pruner.finalize()


def trained(seed: int, steps: int, data: MultiDigits, folder: Path) -> nn.Module:
    """The dense network, from the folder if it is there."""
    model, path = make_model(seed), folder / f"dense-{seed}-{steps}.pt"
    if not path.exists():
        train(model, data, seed, steps=steps, rate=RATE, sparsity=None)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def beginning(start: str, dense: nn.Module, seed: int) -> nn.Module:
    """The network that is pruned."""
    fresh = make_model(seed + 1000)
    if start == "random":
        return fresh
    model = copy.deepcopy(dense)
    if start == "new heads":
        model.heads.load_state_dict(fresh.heads.state_dict())
    return model


def table(lines: list[Mapping[str, Any]]) -> str:
    """A table in Markdown: means over seeds and their standard errors."""
    rows = ["| from | Delta_T, % |", "| --- | ---: |"]
    for name in dict.fromkeys(line["arm"] for line in lines):
        values = [line["delta"] for line in lines if line["arm"] == name]
        error = f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
        rows.append(f"| {name} | {fmean(values):+.1f}{error} |")
    return "\n".join(rows)


def main() -> None:
    """Make the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--folder", default="pretrained", help="where dense networks are kept")
    parser.add_argument("--output", help="a file of JSON lines; a run that it has is not repeated")
    parser.add_argument("--table", metavar="FILE", help="print the table of a file, train nothing")
    parser.add_argument("--quick", action="store_true", help="two arms, some steps, little data")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in Path(args.table).read_text().splitlines()]))
        return
    arms, dense_steps, sizes = ARMS, DENSE_STEPS, (10_000, 2_000)
    if args.quick:
        names = ("random weights, 500 steps", "new heads, alone for 100 steps")
        arms = {name: {**ARMS[name], "steps": 20} for name in names}
        arms[names[1]]["alone"] = 4
        dense_steps, sizes = 10, (64, 64)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = MultiDigits("train", size=sizes[0])
    images, targets = MultiDigits("test", size=sizes[1]).tensors()
    path = Path(args.output) if args.output else None
    done = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    made = {(line["arm"], line["seed"], line["sparsity"]) for line in map(json.loads, done)}
    for seed in args.seeds:
        dense = trained(seed, dense_steps, data, folder)
        base = evaluate(predict(dense, images), targets)
        for name, settings in arms.items():
            if (name, seed, args.sparsity) in made:
                continue
            options = {"steps": 500, "rate": RATE, "sparsity": args.sparsity, **settings}
            model = beginning(options.pop("start", "trained"), dense, seed)
            train(model, data, seed, **options)
            metrics = evaluate(predict(model, images), targets)
            relative = relative_performance(metrics, base, lower_is_better=["mean error (%)"])
            line = {
                "arm": name,
                "seed": seed,
                "sparsity": args.sparsity,
                "delta": round(relative.delta, 3),
                "metrics": metrics,
                "torch": torch.__version__,
            }
            print(f"{name:48} {relative.delta:+7.2f} %", flush=True)
            if path:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
