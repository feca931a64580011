"""The problems that methods are compared on: data, model, tasks and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl.datasets import MultiDigits, Rooms, Words
from torch_adapmtl.models import (
    ASPPHead,
    ClassificationHead,
    MultiTaskModel,
    RegressionHead,
    feature_channels,
)
from torch_adapmtl.tasks import Classification, Depth, Map, Normals, Regression, Segmentation, Task

__all__ = ["PROBLEMS", "Problem", "Samples"]

Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Samples:
    """A data set in memory.

    Attributes:
        inputs: All inputs, `(N, …)`.
        targets: The targets of each task, `(N, …)`.
    """

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def at_most(self, count: int) -> Samples:
        """The first samples."""
        first = {task: target[:count] for task, target in self.targets.items()}
        return Samples(self.inputs[:count], first)

    def to(self, device: str) -> Samples:
        """The same on another device."""
        moved = {task: target.to(device) for task, target in self.targets.items()}
        return Samples(self.inputs.to(device), moved)

    def at(self, rows: Tensor) -> Batch:
        """Some of the samples, as a batch."""
        return self.inputs[rows], {task: target[rows] for task, target in self.targets.items()}

    def shuffled(self, batch: int, seed: int) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order; a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator)
            for rows in order.split(batch):
                if len(rows) == batch:
                    yield self.at(rows.to(self.inputs.device))

    def in_order(self, batch: int) -> Iterator[Batch]:
        """All samples once."""
        for rows in torch.arange(len(self), device=self.inputs.device).split(batch):
            yield self.at(rows)


@dataclass(frozen=True)
class Problem:
    """What is trained, on what, and how; the same for every method.

    Attributes:
        name: Its name.
        load: Makes the training and the test set.
        make_model: Makes the model, with random weights.
        make_tasks: Makes the tasks, by the names of the model's outputs.
        steps: Optimiser steps.
        batch: Samples in a batch.
        lr: Learning rate of Adam at the start; it falls to 0 along a cosine.
        weight_decay: Of Adam (L2).
        threshold_lr: Learning rate of thresholds that are trained by gradient.
        paper_start: `PaperMode.start`, which has to be found for each problem.
    """

    name: str
    load: Callable[[], tuple[Samples, Samples]]
    make_model: Callable[[], nn.Module]
    make_tasks: Callable[[], dict[str, Task]]
    steps: int
    batch: int
    lr: float = 2e-3
    weight_decay: float = 1e-4
    threshold_lr: float = 2e-2
    paper_start: float = -8.0

    @property
    def lower_is_better(self) -> list[tuple[str, str]]:
        """The metrics of which less is better, as `relative_performance` takes them."""
        tasks = self.make_tasks()
        return [
            (name, metric)
            for name, task in tasks.items()
            for metric in task.metrics
            if metric in task.lower_is_better
        ]


_ROOM_TASKS: Mapping[str, Callable[[], Task]] = {
    "segmentation": lambda: Segmentation(5),
    "depth": Depth,
    "normal": Normals,
    "edges": Map,
    "keypoints": Map,
}


def _rooms(name: str, tasks: tuple[str, ...], hidden: int, steps: int) -> Problem:
    def load() -> tuple[Samples, Samples]:
        train = Rooms(1600, image_size=40, tasks=tasks, seed=0)
        test = Rooms(400, image_size=40, tasks=tasks, seed=1)
        return Samples(*train.tensors()), Samples(*test.tensors())

    def make_model() -> nn.Module:
        import timm

        encoder = timm.create_model(
            "resnet18",
            pretrained=False,
            features_only=True,
            out_indices=(3,),
            output_stride=8,
            channels=(24, 48, 96, 192),
        )
        width = feature_channels(encoder)
        channels = Rooms(1, tasks=tasks).channels
        heads = {
            task: ASPPHead(width, channels[task], hidden=hidden, dilations=(1, 2), dropout=0.0)
            for task in tasks
        }
        return MultiTaskModel(encoder, heads)

    return Problem(
        name,
        load,
        make_model,
        lambda: {task: _ROOM_TASKS[task]() for task in tasks},
        steps=steps,
        batch=16,
    )


def _digits() -> Problem:
    def load() -> tuple[Samples, Samples]:
        train, test = (MultiDigits(split, image_size=32) for split in ("train", "test"))
        return Samples(*train.tensors()), Samples(*test.tensors())

    def make_model() -> nn.Module:
        import timm

        encoder = timm.create_model(
            "resnet18",
            pretrained=False,
            num_classes=0,
            in_chans=1,
            channels=(16, 32, 64, 128),
        )
        width = feature_channels(encoder)
        last = {
            "left": ClassificationHead(128, 10),
            "right": ClassificationHead(128, 10),
            "distance": RegressionHead(128),
        }
        heads = {
            task: nn.Sequential(nn.Linear(width, 128), nn.ReLU(), head)
            for task, head in last.items()
        }
        return MultiTaskModel(encoder, heads)

    return Problem(
        "digits",
        load,
        make_model,
        lambda: {
            "left": Classification(10),
            "right": Classification(10),
            "distance": Regression(),
        },
        steps=600,
        batch=32,
    )


class WordModel(nn.Module):
    """A small transformer over letters, with a two-layer head for each task.

    Args:
        classes: The number of classes of each task.
        width: Width of the transformer.
        layers: Number of its layers.
        length: Most letters in a word.
    """

    def __init__(
        self, classes: Mapping[str, int], *, width: int = 96, layers: int = 2, length: int = 16
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(28, width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, count))
                for task, count in classes.items()
            }
        )

    def forward(self, letters: Tensor) -> dict[str, Tensor]:
        """Take letters `(B, L)`, 0 where there is none; return logits by task."""
        empty = letters == 0
        x = self.letters(letters) + self.places
        x = self.norm(self.encoder(x, src_key_padding_mask=empty))
        x = x.masked_fill(empty[..., None], 0.0)
        last = x[torch.arange(len(x), device=x.device), (~empty).sum(1) - 1]
        pooled = torch.cat([x.sum(1) / (~empty).sum(1, keepdim=True), last], dim=1)
        return {task: head(pooled) for task, head in self.heads.items()}


def _words() -> Problem:
    def load() -> tuple[Samples, Samples]:
        train, test = Words("train"), Words("test")
        return Samples(*train.tensors()), Samples(*test.tensors())

    classes = {"syllables": 6, "stress": 6, "last": 39}
    return Problem(
        "words",
        load,
        lambda: WordModel(classes),
        lambda: {task: Classification(count) for task, count in classes.items()},
        steps=1000,
        batch=64,
        lr=1e-3,
    )


#: The problems of the small preset, by name.
PROBLEMS: Mapping[str, Problem] = {
    problem.name: problem
    for problem in (
        _rooms("rooms3", ("segmentation", "depth", "normal"), 96, 500),
        _rooms("rooms5", ("segmentation", "depth", "normal", "edges", "keypoints"), 64, 500),
        _digits(),
        _words(),
    )
}
