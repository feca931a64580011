"""Problems on random data whose answers are known because networks made them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl.benchmark.data import Samples
from torch_adapmtl.benchmark.problem import Problem
from torch_adapmtl.tasks import Regression

__all__ = ["TEACHERS", "TeacherModel", "teachers"]

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
        steps=2000,
        batch=64,
        paper_start=-3.5,
    )


def _standardized(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def _split(samples: Samples, train: int) -> tuple[Samples, Samples]:
    """The first so many, and the rest."""
    rest = torch.arange(train, len(samples))
    return samples.at_most(train), Samples(*samples.at(rest))
