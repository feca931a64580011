"""Prune a network for three tasks to 90 % while it trains, and compare it with the dense one.

Each image contains two scanned digits of scikit-learn (the Multi-MNIST protocol). One network reads
the left and the right digit and estimates their distance. It is trained twice, from the same
weights and on the same batches: dense, and with AdapMTL.

    python examples/quickstart.py            # a few minutes on two cores
    python examples/quickstart.py --quick    # some seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapmtl import (
    Pruner,
    RelativePerformance,
    Report,
    apply_adapmtl,
    relative_performance,
    size,
)
from torch_adapmtl.datasets import MultiDigits
from torch_adapmtl.models import ClassificationHead, MultiTaskModel, RegressionHead

BATCH = 64
COLORS = {
    "overall": "#24292f", "shared": "#8250df", "left": "#e07a1f", "right": "#1a9850",
    "distance": "#d6336c", "truth": "#24292f", "dense": "#818b95", "sparse": "#0969da",
}  # fmt: skip

Metrics = dict[str, dict[str, float]]
Gains = dict[str, tuple[str, float, float]]  # what it is, of the dense and of the sparse model


def make_model(seed: int, channels: Sequence[int] = (32, 64, 128, 256)) -> MultiTaskModel:
    """A narrow ResNet-18 from timm, with random weights, and a head for each task."""
    torch.manual_seed(seed)
    encoder = timm.create_model(
        "resnet18", pretrained=False, in_chans=1, num_classes=0, channels=channels
    )
    width = encoder.num_features

    def head(last: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)

    heads = {
        "left": head(ClassificationHead(width, 10)),
        "right": head(ClassificationHead(width, 10)),
        "distance": head(RegressionHead(width)),
    }
    return MultiTaskModel(encoder, heads)


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One loss for each task."""
    return {
        "left": F.cross_entropy(outputs["left"], targets["left"]),
        "right": F.cross_entropy(outputs["right"], targets["right"]),
        "distance": F.smooth_l1_loss(outputs["distance"], targets["distance"], beta=0.1),
    }


def train(
    model: nn.Module, data: MultiDigits, steps: int, seed: int, pruner: Pruner | None = None
) -> list[Report]:
    """Train the model: with AdapMTL if there is a pruner, else dense; return its reports."""
    images, targets = data.tensors()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reports = [pruner.report()] if pruner else []
    model.train()
    bar = tqdm(range(1, steps + 1), desc="sparse" if pruner else "dense")
    for step in bar:
        rows = torch.randint(len(images), (BATCH,), generator=order)
        losses = task_losses(model(images[rows]), {task: t[rows] for task, t in targets.items()})
        total = pruner.loss(losses) if pruner else sum(losses.values())  # AdapMTL, line 2
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        if pruner:
            pruner.step()  # AdapMTL, line 3
            bar.set_postfix(pruner.postfix())
            if step % 10 == 0 or step == steps:
                reports.append(pruner.report())
    return reports


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs of the model for all images."""
    model.eval()
    parts = [model(batch) for batch in images.split(500)]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def evaluate(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Metrics:
    """The metric of each task, in percent: of the digits, and of the range of distances."""
    accuracy = {
        task: (outputs[task].argmax(1) == targets[task]).float().mean().item()
        for task in ("left", "right")
    }
    error = (outputs["distance"] - targets["distance"]).abs().mean().item()
    return {
        "left": {"accuracy (%)": 100 * accuracy["left"]},
        "right": {"accuracy (%)": 100 * accuracy["right"]},
        "distance": {"mean error (%)": 100 * error},
    }


def print_comparison(
    dense: Metrics, sparse: Metrics, relative: RelativePerformance, gains: Gains
) -> None:
    """Print the metrics, the size and the time of both models; a plus is an improvement."""
    print(f"{'':<10}{'':<24}{'dense':>8}{'sparse':>8}{'change':>11}")
    for task, metrics in dense.items():
        for name, value in metrics.items():
            change = relative.metrics[task][name]
            print(f"{task:<10}{name:<24}{value:8.2f}{sparse[task][name]:8.2f}{change:+9.2f} %")
    for what, (name, before, after) in gains.items():
        times = before / after
        print(f"{what:<10}{name:<24}{before:8.2f}{after:8.2f}{times:9.1f} times less")
    print(f"relative performance Delta_T: {relative.delta:+.2f} %")


def draw(
    images: Tensor,
    readings: Mapping[str, Mapping[str, Tensor]],
    reports: Sequence[Report],
    metrics: Mapping[str, Metrics],
    gains: Gains,
) -> Figure:
    """Draw test images with both models' outputs, the sparsity over time, and what was gained."""
    figure = Figure(figsize=(9, 7), layout="constrained", facecolor="white")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1.9), hspace=0.04)
    middle, right = bottom.subfigures(1, 2, width_ratios=(1, 1.05), wspace=0.03)

    top.suptitle("Test images: left digit, right digit, distance", fontsize=11.5)
    for index, axis in enumerate(top.subplots(1, 6)):
        axis.axis("off")
        axis.set_anchor("N")
        axis.imshow(images[index, 0], cmap="gray")
        for line, (name, outputs) in enumerate(readings.items()):
            digits = [int(outputs[task][index]) for task in ("left", "right")]
            axis.text(
                0.5, -0.06 - 0.16 * line,
                f"{name:<6} {digits[0]} {digits[1]} {float(outputs['distance'][index]):.2f}",
                color=COLORS[name], family="monospace", fontsize=8.5, ha="center", va="top",
                transform=axis.transAxes,
            )  # fmt: skip

    axis = middle.subplots()
    steps = [report.step for report in reports]
    final = reports[-1]
    for index, row in enumerate(final.components):
        path = [100 * report.components[index].sparsity for report in reports]
        label = f"{row.name}: {100 * row.sparsity:.1f} % of {row.weights / 1e3:,.0f} k"
        axis.plot(steps, path, color=COLORS[row.name], lw=1.8, label=label)
    label = f"overall: {100 * final.sparsity:.2f} % of {final.weights / 1e3:,.0f} k"
    path = [100 * report.sparsity for report in reports]
    axis.plot(steps, path, color=COLORS["overall"], lw=3, ls=(0, (1, 0.8)), label=label)
    axis.axhline(100 * final.target_sparsity, color=COLORS["overall"], lw=0.8)
    axis.set(title="Zeros among the weights (%)", xlabel="training step", ylim=(0, 100))
    axis.title.set_size(11.5)
    middle.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)

    rows = []
    for task, title in {
        "left": "left digit",
        "right": "right digit",
        "distance": "distance",
    }.items():
        (name,) = metrics["dense"][task]
        rows.append((f"{title}, {name}", *(metrics[m][task][name] for m in ("dense", "sparse"))))
    rows += [(f"{what}, {name}", *values) for what, (name, *values) in gains.items()]
    axis = right.subplots()
    axis.axvline(100, color=COLORS["dense"], lw=2)
    for line, (title, before, after) in enumerate(rows):
        left_over = 100 * after / before
        axis.plot([100, left_over], [line, line], color=COLORS["sparse"], lw=2.5)
        axis.plot(left_over, line, "o", color=COLORS["sparse"], ms=9)
        axis.text(0, line - 0.28, title, fontsize=9.5)
        axis.text(112, line, f"{before:.2f} → {after:.2f}", fontsize=9.5, va="center")
    axis.set(
        title="The sparse model, in % of the dense one",
        xlim=(0, 160),
        xticks=(0, 50, 100),
        ylim=(len(rows) - 0.5, -0.7),
        yticks=[],
    )
    axis.title.set_size(11.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def main() -> None:
    """Train dense, train sparse, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zero weights")
    parser.add_argument("--steps", type=int, default=500, help="steps of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart.png", help="path of the picture")
    parser.add_argument("--quick", action="store_true", help="a few steps, on little data")
    args = parser.parse_args()
    steps, examples = (10, (1_000, 200)) if args.quick else (args.steps, (10_000, 2_000))

    train_set = MultiDigits("train", size=examples[0])
    images, targets = MultiDigits("test", size=examples[1]).tensors()
    start = time.perf_counter()

    dense = make_model(args.seed)
    train(dense, train_set, steps, args.seed)

    sparse = make_model(args.seed)
    pruner = apply_adapmtl(sparse, target_sparsity=args.sparsity, total_steps=steps)  # line 1
    reports = train(sparse, train_set, steps, args.seed, pruner)
    pruner.finalize()  # plain modules again, with exact zeros

    print(f"\nBoth trained in {time.perf_counter() - start:.0f} s. Where the zeros are:\n")
    print(f"{reports[-1]}\n")
    outputs = {"dense": predict(dense, images), "sparse": predict(sparse, images)}
    metrics = {name: evaluate(out, targets) for name, out in outputs.items()}
    relative = relative_performance(
        metrics["sparse"], metrics["dense"], lower_is_better=["mean error (%)"]
    )
    # The files are written, and 16 images are computed at a time, on a CPU.
    torch.set_num_threads(1)
    gained = size(sparse, images[:16], latency=True)
    files = [gained.files[name] / 1e6 for name in ("torch.save", "save_sparse")]
    times = [gained.latency[name] for name in ("as it is", "accelerated")]
    gains: Gains = {"file": ("MB", *files), "time": ("ms for 16 images", *times)}
    print_comparison(metrics["dense"], metrics["sparse"], relative, gains)
    print(f"\n{gained}\n")

    readings: dict[str, Mapping[str, Tensor]] = {"truth": targets}
    for name, out in outputs.items():
        digits = {task: out[task].argmax(1) for task in ("left", "right")}
        readings[name] = {**digits, "distance": out["distance"]}
    draw(images, readings, reports, metrics, gains).savefig(args.output, dpi=150)
    print(f"The picture is {args.output}")


if __name__ == "__main__":
    main()
