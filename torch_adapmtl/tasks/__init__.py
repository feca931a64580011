"""Losses and metrics of the paper's tasks, and of classification and regression.

A task takes a prediction and a target. Pixels that a target marks as unknown (see
[`IGNORE`][torch_adapmtl.datasets.IGNORE]) count neither in the loss nor in the metrics. Metrics are
accumulated on the device of the predictions. `loss` does not wait for the device; `update` may wait
to select the valid pixels, and `compute` reads the metrics.
"""

from __future__ import annotations

try:
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_adapmtl.tasks needs torchmetrics; install it with "
        'pip install "torch-adapmtl[examples]"'
    ) from error

from torch_adapmtl.tasks._base import Task
from torch_adapmtl.tasks.dense import Depth, Map, Normals, Segmentation
from torch_adapmtl.tasks.vector import Classification, Regression

__all__ = ["Classification", "Depth", "Map", "Normals", "Regression", "Segmentation", "Task"]
