"""What the tests of several tasks need."""

from __future__ import annotations

from torch import Tensor

from torch_adapmtl.tasks import Task

NORMAL_METRICS = (
    *("angle_mean", "angle_median", "cosine"),
    *("within_11.25", "within_22.5", "within_30"),
)


def measured(task: Task, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The metrics of these batches of predictions and targets."""
    for prediction, target in batches:
        task.update(prediction, target)
    return task.compute()
