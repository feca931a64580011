"""Dense prediction: prune a network for segmentation, depth and normals to 90 % while it trains.

The images are rendered rooms with exact ground truth, which the script generates. The network is a
timm ResNet with an ASPP head for each task, as in the paper. It is trained twice, from the same
weights and on the same batches: dense, and with AdapMTL.

    python examples/rooms.py                  # some minutes on two cores
    python examples/rooms.py --device cuda    # the same on a GPU
    python examples/rooms.py --quick          # a few seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import timm
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapmtl import Pruner, apply_adapmtl, relative_performance, size
from torch_adapmtl.datasets import Rooms
from torch_adapmtl.models import ASPPHead, MultiTaskModel, feature_channels
from torch_adapmtl.tasks import Depth, Normals, Segmentation

Metrics = dict[str, dict[str, float]]
BATCH = 16
# Losses and metrics use the pixels with a label; depths are in metres, angles in degrees.
TASKS = {
    "segmentation": Segmentation(5),
    "depth": Depth(metrics=["abs_error", "rel_error"]),
    "normal": Normals(metrics=["angle_mean", "angle_median"]),
}
PALETTE = ListedColormap(["#c9b79c", "#dfe6ee", "#8fa9c4", "#e07a3f", "#5b8c5a"])


def make_model(channels: Mapping[str, int], seed: int) -> MultiTaskModel:
    """A narrow ResNet-18 from timm at stride 8, with random weights, and an ASPP head per task."""
    torch.manual_seed(seed)
    encoder = timm.create_model(
        "resnet18",
        pretrained=False,
        features_only=True,
        out_indices=(3,),
        output_stride=8,
        channels=(32, 64, 128, 256),
    )
    width = feature_channels(encoder)
    heads = {
        task: ASPPHead(width, out, hidden=128, dilations=(1, 2), dropout=0.0)
        for task, out in channels.items()
    }
    return MultiTaskModel(encoder, heads)


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy, L1, and one minus the cosine."""
    return {name: task.loss(outputs[name], targets[name]) for name, task in TASKS.items()}


def train(
    model: nn.Module, data: Rooms, steps: int, seed: int, pruner: Pruner | None = None
) -> None:
    """Train the model: with AdapMTL if there is a pruner, else dense."""
    images, targets = data.tensors()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in tqdm(range(steps), desc="sparse" if pruner else "dense"):
        rows = torch.randint(len(images), (BATCH,), generator=order).to(images.device)
        losses = task_losses(model(images[rows]), {task: t[rows] for task, t in targets.items()})
        total = pruner.loss(losses) if pruner else sum(losses.values())  # AdapMTL, line 2
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        if pruner:
            pruner.step()  # AdapMTL, line 3


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs of the model for all images."""
    model.eval()
    parts = [model(batch) for batch in images.split(100)]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def evaluate(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Metrics:
    """All metrics of all tasks."""
    metrics = {}
    for name, task in TASKS.items():
        task.reset()
        task.update(outputs[name], targets[name])
        metrics[name] = task.compute()
    return metrics


def print_comparison(dense: Metrics, sparse: Metrics) -> None:
    """Print the metrics of both models; a positive change is an improvement."""
    lower = [metric for task in TASKS.values() for metric in task.lower_is_better]
    relative = relative_performance(sparse, dense, lower_is_better=lower)
    print(f"{'task':<14}{'metric':<18}{'dense':>9}{'sparse':>9}{'change':>10}")
    for task, metrics in dense.items():
        for name, value in metrics.items():
            change = relative.metrics[task][name]
            print(f"{task:<14}{name:<18}{value:9.3f}{sparse[task][name]:9.3f}{change:+8.2f} %")
    print(f"relative performance Delta_T: {relative.delta:+.2f} %")


def draw(
    images: Tensor, maps: Mapping[str, Mapping[str, Tensor]], metrics: Mapping[str, Metrics]
) -> Figure:
    """Draw a row per scene: the image, then truth, dense and sparse prediction of each task."""
    captions = {"segmentation": "{:.1f} % mIoU", "depth": "{:.2f} m off", "normal": "{:.1f}° off"}
    ratios = [1, *[0.15, 1, 1, 1] * len(captions)]
    figure = Figure(figsize=(12, 1.13 * len(images) + 0.75), facecolor="white")
    axes = figure.subplots(len(images), len(ratios), width_ratios=ratios, squeeze=False)
    top = 1 - 0.72 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.008, top=top, wspace=0.04, hspace=0.04)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title("image\n", fontsize=10)
    for row, image in enumerate(images):
        axes[row, 0].imshow(as_picture("image", image))
        near, far = maps["truth"]["depth"][row].aminmax()
        limits = {"segmentation": (0, 4), "depth": (near, far), "normal": (None, None)}
        places = iter(axes[row, 1:])
        for task, caption in captions.items():
            next(places)  # a gap
            for name, predicted in maps.items():
                axis, (low, high) = next(places), limits[task]
                cmap = PALETTE if task == "segmentation" else "viridis"
                axis.imshow(as_picture(task, predicted[task][row]), cmap, vmin=low, vmax=high)
                if row == 0:
                    value = next(iter(metrics[name][task].values())) if name in metrics else None
                    below = "" if value is None else caption.format(value)
                    above = task if name == "dense" else ""
                    axis.set_title(f"{above}\n{name}\n{below}", fontsize=10)
    return figure


def as_picture(task: str, values: Tensor) -> Tensor:
    """An image or a map in the form that `imshow` draws."""
    if task == "image":
        return values.clamp(0, 1).permute(1, 2, 0)
    if task == "segmentation":
        return values.argmax(0) if values.ndim == 3 else values
    if task == "depth":
        return values[0]
    toward_us = values.new_tensor([1.0, -1.0, -1.0])[:, None, None]  # red right, green up
    return (F.normalize(values, dim=0) * toward_us).add(1).div(2).permute(1, 2, 0)


def main() -> None:
    """Train dense, train sparse, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zero weights")
    parser.add_argument("--steps", type=int, default=1000, help="steps of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="rooms.png", help="path of the picture")
    parser.add_argument("--quick", action="store_true", help="a few steps, on little data")
    args = parser.parse_args()
    steps, scenes, pixels = (6, (64, 16), 32) if args.quick else (args.steps, (1600, 400), 64)

    train_set = Rooms(scenes[0], image_size=pixels, seed=0, device=args.device)
    test_set = Rooms(scenes[1], image_size=pixels, seed=1, device=args.device)
    images, targets = test_set.tensors()
    start = time.perf_counter()

    dense = make_model(train_set.channels, args.seed).to(args.device)
    train(dense, train_set, steps, args.seed)

    sparse = make_model(train_set.channels, args.seed).to(args.device)
    pruner = apply_adapmtl(sparse, target_sparsity=args.sparsity, total_steps=steps)  # line 1
    train(sparse, train_set, steps, args.seed, pruner)
    print(f"\nBoth trained in {time.perf_counter() - start:.0f} s. Where the zeros are:\n")
    print(f"{pruner.report()}\n")
    pruner.finalize()  # plain modules again, with exact zeros

    outputs = {"dense": predict(dense, images), "sparse": predict(sparse, images)}
    metrics = {name: evaluate(out, targets) for name, out in outputs.items()}
    print_comparison(metrics["dense"], metrics["sparse"])
    print(f"\n{size(sparse, images[:1])}")

    maps = {
        name: {task: values[:5].cpu() for task, values in by_task.items()}
        for name, by_task in {"truth": targets, **outputs}.items()
    }
    draw(images[:5].cpu(), maps, metrics).savefig(args.output, dpi=150)
    print(f"The picture is {args.output}")


if __name__ == "__main__":
    main()
