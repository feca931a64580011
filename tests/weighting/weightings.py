"""Weightings of every kind, and losses to feed them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_adapmtl import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
    LossWeighting,
    StabilityWeighting,
)

TASKS = ("seg", "depth", "normal")


def scalars(**values: float) -> dict[str, Tensor]:
    return {task: torch.tensor(value, dtype=torch.float64) for task, value in values.items()}


def as_losses(row: list[float | None], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A row of values (None: missing) as losses of tasks t0, t1, ..."""
    return {
        f"t{i}": None if value is None else torch.tensor(value, dtype=dtype)
        for i, value in enumerate(row)
    }


def feed(weighting: LossWeighting, rows: list[list[float | None]]) -> LossWeighting:
    for row in rows:
        if any(value is not None for value in row):
            weighting(as_losses(row))
    return weighting


def inverse(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: 1 / loss for task, loss in losses.items()}


def all_weightings(tasks: tuple[str, ...] = TASKS) -> list[LossWeighting]:
    return [
        EqualWeighting(tasks),
        FixedWeighting(tasks, {task: i + 1.0 for i, task in enumerate(tasks)}),
        CallableWeighting(tasks, inverse),
        StabilityWeighting(tasks, window=5, start=0),
        StabilityWeighting(tasks, window=5, start=0, direction="deviating", bounds=None),
        StabilityWeighting(tasks, window=5, start=0, deviation="coefficient_of_variation"),
    ]


WEIGHTINGS = pytest.mark.parametrize("index", range(6))
