"""Train to 90 % zeros in a process that may be killed at any time, and resume the run.

Start the script, kill it (`kill -9`), and start it again with the same folder: the result is
bit-identical to that of a run that was not killed. A checkpoint holds the state of the model, which
contains that of the pruner, the states of the optimiser and the learning-rate schedule, and the
random state. It is written to a new file that then replaces the old one atomically, so that there
is a complete checkpoint at any time.

    python examples/resume.py --folder run            # two minutes on two cores; kill it and see
    python examples/resume.py --folder run --quick    # some seconds
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapmtl import apply_adapmtl
from torch_adapmtl.datasets import MultiDigits

BATCH = 32


class Reader(nn.Module):
    """Reads the left and the right digit of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1)),
        )
        self.left, self.right = nn.Linear(128, 10), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits by task, (N, 10) each, of images (N, 1, H, W)."""
        features = self.encoder(x)
        return {"left": self.left(features), "right": self.right(features)}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a complete one exists at any time."""
    new = path.with_suffix(".new")
    with open(new, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def train(
    folder: Path,
    steps: int,
    every: int,
    watch: Callable[[int, str], None] = lambda step, moment: None,
    **options: Any,
) -> nn.Module:
    """Train to the end of the run, from the checkpoint in the folder if there is one.

    Args:
        folder: The folder of the checkpoint.
        steps: Optimiser steps of the whole run.
        every: Steps from one checkpoint to the next.
        watch: Called at several points of a step; tests kill the process there.
        **options: Further arguments of `apply_adapmtl`.
    """
    torch.manual_seed(0)
    images, targets = MultiDigits("train", size=1000, image_size=24).tensors()
    model = Reader()
    options = {"target_sparsity": 0.9, "example_inputs": images[:2], **options}
    pruner = apply_adapmtl(model, total_steps=steps, **options)
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=3e-3, weight_decay=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    path, done = folder / "checkpoint.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        done = state["done"]

    for step in tqdm(range(done, steps), initial=done, total=steps):
        watch(step, "before")
        rows = torch.randint(len(images), (BATCH,))
        outputs = model(images[rows])
        losses = {task: F.cross_entropy(out, targets[task][rows]) for task, out in outputs.items()}
        optimizer.zero_grad()
        pruner.loss(losses).backward()
        optimizer.step()
        schedule.step()
        watch(step, "between")
        pruner.step()
        if (step + 1) % every == 0:
            watch(step, "saving")
            save(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "rng": torch.get_rng_state(),
                    "done": step + 1,
                },
            )
    print(pruner.report())
    return pruner.finalize()


def main() -> None:
    """Train, or resume."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("run"), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    steps, every = (40, 10) if args.quick else (args.steps, args.every)
    model = train(args.folder, steps, every)
    save(args.folder / "sparse.pt", model.state_dict())
    print(f"The sparse model is {args.folder / 'sparse.pt'}")


if __name__ == "__main__":
    main()
