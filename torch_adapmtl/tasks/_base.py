"""What all tasks share, and what the dense ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["DenseTask", "Task"]


class Task(ABC):
    """A loss, and metrics that are accumulated over a test set.

    Args:
        metrics: Names of the metrics to compute; None for the task's default.

    Attributes:
        lower_is_better: The computed metrics of which a lower value is better.

    Raises:
        ValueError: If `metrics` is empty or has a name that the task does not know.
    """

    lower_is_better: frozenset[str] = frozenset()

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        known = self._make_metrics()
        names = list(self._default_metrics) if metrics is None else list(metrics)
        if not names or any(name not in known for name in names):
            raise ValueError(f"metrics must be some of {list(known)}, got {metrics!r}")
        self._metrics = {name: known[name] for name in names}
        self.lower_is_better = self.lower_is_better & self._metrics.keys()

    _default_metrics: Sequence[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the computed metrics."""
        return tuple(self._metrics)

    @abstractmethod
    def _make_metrics(self) -> Mapping[str, Metric]:
        """Make all metrics that the task knows, by name."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean loss over the valid entries of the target, 0-d; 0 if there are none.

        A loss of exactly 0 tells [`LossWeighting`][torch_adapmtl.LossWeighting] that the batch has
        no labels for the task.
        """

    @abstractmethod
    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        """The arguments of each metric's `update`, by the metric's name."""

    # Metric states that are created in inference mode could not be updated outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of predictions and targets to the metrics."""
        for name, inputs in self._metric_inputs(prediction.float(), target).items():
            if name in self._metrics and inputs[0].numel():
                self._metrics[name].to(inputs[0].device).update(*inputs)

    def compute(self) -> dict[str, float]:
        """The metrics over all batches since the last `reset`, in the units of the class."""
        return {name: self._scale(name) * float(m.compute()) for name, m in self._metrics.items()}

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget all batches."""
        for metric in self._metrics.values():
            metric.reset()

    def _scale(self, name: str) -> float:
        """The factor that brings a metric to its unit, such as 100 for percent."""
        return 1.0


class DenseTask(Task):
    """A prediction and a target for every pixel. Where their sizes differ, one is resized.

    The loss resizes the target to the prediction (nearest pixel), the metrics resize the
    prediction to the target (bilinear), as the reference code does.

    Raises:
        ValueError: By `loss` and `update`, if batch or channels of the two differ.
    """

    _same_channels = True  # whether a target has as many channels as a prediction

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        size = prediction.shape[-2:]
        if target.shape[-2:] != size:
            planes = target if target.ndim == 4 else target[:, None]
            resized = F.interpolate(planes.float(), size=size, mode="nearest").to(target.dtype)
            target = resized if target.ndim == 4 else resized[:, 0]
        self._check_shapes(prediction, target)
        return self._loss(prediction.float(), target)

    @abstractmethod
    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of a prediction and a target of the same size."""

    @torch.inference_mode(False)
    def update(self, prediction: Tensor, target: Tensor) -> None:
        size = target.shape[-2:]
        if prediction.shape[-2:] != size:
            prediction = F.interpolate(
                prediction.float(), size=size, mode="bilinear", align_corners=False
            )
        self._check_shapes(prediction, target)
        super().update(prediction, target)

    def _check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        # Without this check, shapes that differ would be broadcast.
        if self._same_channels and prediction.shape != target.shape:
            raise ValueError(
                f"prediction and target must have the same batch and channels (B, C, H, W), got "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )
