"""Problems on random data whose answers are known because networks made them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from torch_adapmtl.tasks import Classification, Regression

__all__ = ["TEACHERS", "TabularModel", "TeacherModel", "tabular", "teachers"]

#: Hidden units of the networks that the tasks of the problem `teachers` are to imitate.
TEACHERS: Mapping[str, int] = {"narrow": 2, "middle": 8, "wide": 32}


class TeacherModel(nn.Module):
    """A shared perceptron, and a head of the same size for each teacher."""

    def __init__(self, inputs: int = 16, width: int = 64) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
                for task in TEACHERS
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Take `(B, inputs)`; return `(B, 1)` by task."""
        h = self.shared(x)
        return {task: head(h) for task, head in self.heads.items()}


def teachers() -> Problem:
    """Tasks of known difficulty: the wider its teacher, the more weights a head needs."""

    def load() -> tuple[Samples, Samples]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(10_000, 16, generator=generator)
        targets = {}
        for task, hidden in TEACHERS.items():
            first = torch.randn(hidden, 16, generator=generator) / 4
            last = torch.randn(1, hidden, generator=generator)
            found = F.linear(F.linear(inputs, first).relu(), last)
            targets[task] = _standardized(found)
        return _split(Samples(inputs, targets), 8000)

    return Problem(
        "teachers",
        load,
        TeacherModel,
        lambda: {task: Regression() for task in TEACHERS},
        steps=1000,
        batch=64,
    )


class TabularModel(nn.Module):
    """A residual perceptron over rows of numbers, with a two-layer head for each task.

    Args:
        outputs: What each task predicts: so many numbers.
        inputs: Columns.
        width: Of all hidden layers.
        blocks: Residual blocks.
    """

    def __init__(
        self, outputs: Mapping[str, int], *, inputs: int = 32, width: int = 192, blocks: int = 4
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, count))
                for task, count in outputs.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Take `(B, inputs)`; return `(B, outputs)` by task."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        return {task: head(x) for task, head in self.heads.items()}


def tabular() -> Problem:
    """Two tasks that can be learned and two that are mostly noise.

    The loss of a task that cannot be learned is flat, which is what stable looks like.
    """
    outputs = {"class": 8, "value": 1, "noisy_class": 4, "noisy_value": 1}

    def load() -> tuple[Samples, Samples]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(24_000, 32, generator=generator)

        def taught(count: int, hidden: int = 24) -> Tensor:
            x = inputs
            for _ in range(2):
                weight = torch.randn(hidden, x.shape[1], generator=generator)
                x = F.linear(x, 1.5 * weight / x.shape[1] ** 0.5).tanh()
            return F.linear(x, torch.randn(count, hidden, generator=generator))

        kind, value = taught(8).argmax(1), _standardized(taught(1))
        noisy_kind, noisy_value = taught(4).argmax(1), _standardized(taught(1))
        noise = torch.randint(4, noisy_kind.shape, generator=generator)
        random = torch.rand(noise.shape, generator=generator) < 0.85
        targets = {
            "class": kind,
            "value": value,
            "noisy_class": torch.where(random, noise, noisy_kind),
            "noisy_value": 0.3 * noisy_value + torch.randn(value.shape, generator=generator),
        }
        return _split(Samples(inputs, targets), 20_000)

    return Problem(
        "tabular",
        load,
        lambda: TabularModel(outputs),
        lambda: {
            "class": Classification(outputs["class"]),
            "value": Regression(),
            "noisy_class": Classification(outputs["noisy_class"]),
            "noisy_value": Regression(),
        },
        steps=600,
        batch=128,
        lr=1e-3,
    )


def _standardized(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def _split(samples: Samples, train: int) -> tuple[Samples, Samples]:
    """The first so many, and the rest."""
    rest = torch.arange(train, len(samples))
    return samples.at_most(train), Samples(*samples.at(rest))
