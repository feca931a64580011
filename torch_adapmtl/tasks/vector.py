"""Tasks with one vector for each example: classes and numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy

from torch_adapmtl.tasks._base import Task

__all__ = ["Classification", "Regression"]


class Classification(Task):
    """One class for each example. Loss: cross-entropy. Metric: `"accuracy"`, in percent.

    Prediction: logits `(B, C)`. Target: classes `(B,)`, int64; none may be unknown.

    Args:
        classes: Number of classes, C.

    Example:
        >>> import torch
        >>> task = Classification(2)
        >>> task.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> task.compute()
        {'accuracy': 50.0}
    """

    _default_metrics = ("accuracy",)

    def __init__(self, classes: int) -> None:
        self.classes = classes
        super().__init__()

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.classes, average="micro")}

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy, 0-d."""
        return F.cross_entropy(prediction.float(), target)

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        return {"accuracy": (prediction, target)}

    def _scale(self, name: str) -> float:
        return 100.0


class Regression(Task):
    """One or more numbers for each example. Loss: mean squared error. Metric: `"abs_error"`.

    Prediction and target `(B, D)`. `"abs_error"` is the mean absolute error, in the target's unit.

    Example:
        >>> import torch
        >>> task = Regression()
        >>> task.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [3.0]]))
        >>> task.compute()
        {'abs_error': 0.5}
    """

    lower_is_better = frozenset({"abs_error"})
    _default_metrics = ("abs_error",)

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {"abs_error": MeanAbsoluteError()}

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean squared error, 0-d."""
        return F.mse_loss(prediction.float(), target)

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        # torchmetrics calls `view`, which needs contiguous tensors.
        return {"abs_error": (prediction.contiguous(), target.contiguous())}
