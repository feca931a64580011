"""The paper's tasks, and classification: losses over the valid pixels, and its tables' metrics.

A task takes a prediction and a target. Pixels that a target marks as unknown (see
[`IGNORE`][torch_adapmtl.datasets.IGNORE]) count in neither loss nor metric. Metrics are those of
torchmetrics where it has them; all are accumulated on the device of what they are given. `loss`
does not wait for the device; `update` may, to pick out the valid pixels, and `compute` reads the
metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

__all__ = ["Classification", "Depth", "Map", "Normals", "Regression", "Segmentation", "Task"]


class Task(ABC):
    """A loss, and metrics that are accumulated over a test set.

    Args:
        metrics: Names of the metrics to compute; all that the task has if None.

    Attributes:
        lower_is_better: Those of the computed metrics of which less is better.

    Raises:
        ValueError: If a metric is not one of the task's.
    """

    lower_is_better: frozenset[str] = frozenset()

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        known = self._make()
        names = list(self._default) if metrics is None else list(metrics)
        if not names or any(name not in known for name in names):
            raise ValueError(f"metrics must be some of {list(known)}, got {metrics!r}")
        self._metrics = {name: known[name] for name in names}
        self.lower_is_better = self.lower_is_better & self._metrics.keys()

    _default: Sequence[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that are computed."""
        return tuple(self._metrics)

    @abstractmethod
    def _make(self) -> Mapping[str, Metric]:
        """All metrics of the task, by name."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean loss over what is valid in the target, 0-d; 0 if nothing is."""

    @abstractmethod
    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        """What each metric's `update` takes."""

    @torch.inference_mode(False)  # else a later update could not add to what this one has kept
    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take a batch of predictions and targets into the metrics."""
        for name, values in self._values(prediction.float(), target).items():
            if name in self._metrics and values[0].numel():
                self._metrics[name].to(values[0].device).update(*values)

    def compute(self) -> dict[str, float]:
        """The metrics over all batches since the last `reset`, in the units that the class says."""
        return {name: self._scale(name) * float(m.compute()) for name, m in self._metrics.items()}

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget all batches."""
        for metric in self._metrics.values():
            metric.reset()

    def _scale(self, name: str) -> float:
        return 1.0


class _Dense(Task):
    """A prediction and a target for every pixel, brought to the same size where they differ.

    For the loss the target is resized to the prediction (nearest pixel), for the metrics the
    prediction to the target (bilinear), as in the reference code.

    Raises:
        ValueError: By `loss` and `update`, if batch or channels of the two differ.
    """

    _alike = True  # the target has the prediction's channels

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        size = prediction.shape[-2:]
        if target.shape[-2:] != size:
            planes = target if target.ndim == 4 else target[:, None]
            resized = F.interpolate(planes.float(), size=size, mode="nearest").to(target.dtype)
            target = resized if target.ndim == 4 else resized[:, 0]
        self._check(prediction, target)
        return self._loss(prediction.float(), target)

    @abstractmethod
    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor: ...

    @torch.inference_mode(False)
    def update(self, prediction: Tensor, target: Tensor) -> None:
        size = target.shape[-2:]
        if prediction.shape[-2:] != size:
            prediction = F.interpolate(
                prediction.float(), size=size, mode="bilinear", align_corners=False
            )
        self._check(prediction, target)
        super().update(prediction, target)

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        if self._alike and prediction.shape != target.shape:  # or they would be broadcast
            raise ValueError(
                f"prediction and target must have the same batch and channels (B, C, H, W), got "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )


class Segmentation(_Dense):
    """Semantic segmentation: cross-entropy; mIoU and pixel accuracy, in percent.

    Prediction: logits `(B, C, H, W)`. Target: classes `(B, H, W)`, int64. The mean over classes
    is over those that occur in target or prediction.

    Args:
        classes: Number of classes, C.
        ignore_index: The target's value for unknown pixels.
        class_weights: Weight of each class in the cross-entropy, `(C,)`, as Tiny-Taskonomy has.
        metrics: Some of `"mIoU"`, `"pixel_accuracy"` (the default, as for NYU-v2) and
            `"cross_entropy"` (as for Tiny-Taskonomy).

    Raises:
        ValueError: If a metric is unknown, or the weights are not one for each class, finite and
            >= 0.

    Example:
        >>> task = Segmentation(2)
        >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]])
        >>> task.update(logits, torch.tensor([[[0, 255]]]))
        >>> task.compute()
        {'mIoU': 100.0, 'pixel_accuracy': 100.0}
    """

    lower_is_better = frozenset({"cross_entropy"})
    _default = ("mIoU", "pixel_accuracy")
    _alike = False

    def __init__(
        self,
        classes: int,
        *,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        metrics: Sequence[str] | None = None,
    ) -> None:
        if class_weights is not None:
            if class_weights.shape != (classes,):
                raise ValueError(
                    f"class_weights must be one number for each of {classes} classes, got the "
                    f"shape {tuple(class_weights.shape)}"
                )
            if not (class_weights.isfinite() & (class_weights >= 0)).all():
                raise ValueError(
                    f"class_weights must be finite and >= 0, got {class_weights.tolist()}"
                )
        self.classes, self.ignore_index = classes, ignore_index
        self.class_weights = class_weights
        super().__init__(metrics)

    def _make(self) -> Mapping[str, Metric]:
        return {
            "mIoU": MulticlassJaccardIndex(self.classes, ignore_index=self.ignore_index),
            "pixel_accuracy": MulticlassAccuracy(
                self.classes, average="micro", ignore_index=self.ignore_index
            ),
            "cross_entropy": _Mean(),
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        total, weight = self._summed(prediction, target)
        return total / weight.clamp(min=1e-12)

    def _summed(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted cross-entropies of all valid pixels, summed, and the sum of the weights."""
        valid = target != self.ignore_index
        weights = self.class_weights
        if weights is not None:
            with torch.inference_mode(False):  # for the training that comes after a test, too
                weights = weights.to(prediction.device, prediction.dtype)
            self.class_weights = weights  # copied to the device but once
        each = F.cross_entropy(
            prediction, target, weight=weights, ignore_index=self.ignore_index, reduction="none"
        )
        weight = valid if weights is None else weights[target.where(valid, 0)] * valid
        return each.sum(), weight.sum()

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        total, weight = self._summed(prediction, target)
        pair = (prediction, target)
        return {
            "mIoU": pair,
            "pixel_accuracy": pair,
            "cross_entropy": (total, weight),
        }

    def _scale(self, name: str) -> float:
        return 1.0 if name == "cross_entropy" else 100.0


class Depth(_Dense):
    """Depth: L1; absolute and relative error, and the shares of pixels within a ratio.

    Prediction and target `(B, 1, H, W)`; a target of 0 is unknown. `"abs_error"` is in the
    target's unit, `"rel_error"` a fraction of the target; `"within_1.25"`, `"within_1.25^2"` and
    `"within_1.25^3"` are the percentages of pixels at which prediction / target and its inverse
    are below that.

    Args:
        metrics: Some of these; all if None.

    Example:
        >>> task = Depth(metrics=["abs_error", "within_1.25"])
        >>> task.update(torch.tensor([[[[2.0, 4.0, 9.0]]]]), torch.tensor([[[[2.0, 3.0, 0.0]]]]))
        >>> task.compute()
        {'abs_error': 0.5, 'within_1.25': 50.0}
    """

    lower_is_better = frozenset({"abs_error", "rel_error"})
    _default = ("abs_error", "rel_error", "within_1.25", "within_1.25^2", "within_1.25^3")

    def _make(self) -> Mapping[str, Metric]:
        return {
            "abs_error": MeanAbsoluteError(),
            "rel_error": MeanAbsolutePercentageError(),
            **{name: _Mean() for name in self._default[2:]},
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _mean((prediction - target).abs(), target > 0)

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        valid = target > 0
        found, true = prediction[valid], target[valid]
        # A depth that is not positive is as far off as can be.
        ratio = torch.where(found > 0, torch.maximum(found / true, true / found), torch.inf)
        return {
            "abs_error": (found, true),
            "rel_error": (found, true),
            **{
                name: ((ratio < 1.25**power).float(),)
                for power, name in enumerate(self._default[2:], start=1)
            },
        }

    def _scale(self, name: str) -> float:
        return 100.0 if name.startswith("within") else 1.0


class Normals(_Dense):
    """Surface normals: one minus the cosine; angles in degrees and shares below some, in percent.

    Prediction `(B, 3, H, W)`, of any length; target the same, of unit length, and 0 where unknown.
    The median angle is exact to a hundredth of a degree. A prediction of 0, which has no direction,
    is rated as 90 degrees off; one that is not finite as 180.

    Args:
        metrics: Some of `"angle_mean"`, `"angle_median"`, `"within_11.25"`, `"within_22.5"`,
            `"within_30"` (the default, as for NYU-v2) and `"cosine"`, the mean cosine of the angle
            (as for Tiny-Taskonomy).

    Example:
        >>> task = Normals(metrics=["angle_mean", "within_30"])
        >>> up, right = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> prediction = torch.stack([up, up], dim=1).view(1, 3, 1, 2)
        >>> task.update(prediction, torch.stack([up, right], dim=1).view(1, 3, 1, 2))
        >>> task.compute()
        {'angle_mean': 45.0, 'within_30': 50.0}
    """

    lower_is_better = frozenset({"angle_mean", "angle_median"})
    _default = ("angle_mean", "angle_median", "within_11.25", "within_22.5", "within_30")

    def _make(self) -> Mapping[str, Metric]:
        return {
            **{name: _Mean() for name in (*self._default, "cosine")},
            "angle_median": _MedianAngle(),
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = _known(target)
        target = torch.where(valid[:, None], target, 0.0)  # a NaN would reach the gradient
        return _mean(1 - F.cosine_similarity(prediction, target, dim=1), valid)

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        valid = _known(target)
        found = F.normalize(prediction, dim=1).movedim(1, -1)[valid]
        true = F.normalize(target, dim=1).movedim(1, -1)[valid]
        cosine = (found * true).sum(-1)
        # Not the arc cosine, which loses half the digits of a small angle.
        angle = torch.atan2(torch.linalg.cross(found, true).norm(dim=-1), cosine).rad2deg()
        # atan2(0, 0) is 0: a dead head would be perfect. What is no number is as far off as can be.
        angle = angle.where(found.any(-1), 90.0).nan_to_num(180.0)
        return {
            "angle_mean": (angle,),
            "angle_median": (angle,),
            "cosine": (cosine.nan_to_num(-1.0),),
            **{
                name: ((angle < float(name.removeprefix("within_"))).float(),)
                for name in self._default[2:]
            },
        }

    def _scale(self, name: str) -> float:
        return 100.0 if name.startswith("within") else 1.0


class Map(_Dense):
    """Any other map, such as edges or keypoints: L1 for loss and metric (`"abs_error"`).

    Prediction and target `(B, C, H, W)`; a target of NaN is unknown.

    Example:
        >>> task = Map()
        >>> target = torch.tensor([[[[1.0, torch.nan]]]])
        >>> task.loss(torch.zeros(1, 1, 1, 2), target)
        tensor(1.)
    """

    lower_is_better = frozenset({"abs_error"})
    _default = ("abs_error",)

    def _make(self) -> Mapping[str, Metric]:
        return {"abs_error": MeanAbsoluteError()}

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _mean((prediction - target.nan_to_num()).abs(), ~target.isnan())

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        valid = ~target.isnan()
        return {"abs_error": (prediction[valid], target[valid])}


class Classification(Task):
    """One class for each example: cross-entropy; accuracy in percent.

    Prediction: logits `(B, C)`. Target: classes `(B,)`, int64; none is unknown.

    Args:
        classes: Number of classes, C.

    Example:
        >>> task = Classification(2)
        >>> task.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> task.compute()
        {'accuracy': 50.0}
    """

    _default = ("accuracy",)

    def __init__(self, classes: int) -> None:
        self.classes = classes
        super().__init__()

    def _make(self) -> Mapping[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.classes, average="micro")}

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy, 0-d."""
        return F.cross_entropy(prediction.float(), target)

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        return {"accuracy": (prediction, target)}

    def _scale(self, name: str) -> float:
        return 100.0


class Regression(Task):
    """Numbers for each example: mean squared error as the loss; mean absolute error.

    Prediction and target `(B, D)`.

    Example:
        >>> task = Regression()
        >>> task.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [3.0]]))
        >>> task.compute()
        {'abs_error': 0.5}
    """

    lower_is_better = frozenset({"abs_error"})
    _default = ("abs_error",)

    def _make(self) -> Mapping[str, Metric]:
        return {"abs_error": MeanAbsoluteError()}

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean squared error, 0-d."""
        return F.mse_loss(prediction.float(), target)

    def _values(self, prediction: Tensor, target: Tensor) -> Mapping[str, tuple[Tensor, ...]]:
        return {"abs_error": (prediction.contiguous(), target.contiguous())}  # torchmetrics views


class _Mean(Metric):
    """A mean over all batches; unlike torchmetrics' it keeps a NaN, and reads nothing to find it.

    `update` takes values, or the sum of weighted values and that of their weights.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Add the values."""
        self.total += values.sum()
        self.weight += values.numel() if weight is None else weight

    def compute(self) -> Tensor:
        """The mean; NaN if there was nothing."""
        return self.total / self.weight


class _MedianAngle(Metric):
    """The median of angles in degrees, from a histogram: constant memory, on the device."""

    counts: Tensor
    _BIN = 0.01

    def __init__(self) -> None:
        super().__init__()
        bins = round(180 / self._BIN) + 1
        self.add_state("counts", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, angle: Tensor) -> None:
        """Count the angles."""
        index = (angle / self._BIN).long().clamp(0, len(self.counts) - 1)
        self.counts += torch.bincount(index.flatten(), minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The middle of the bin that the (lower) median lies in; NaN if there was nothing."""
        upto = self.counts.cumsum(0)
        middle = torch.div(upto[-1] + 1, 2, rounding_mode="floor")
        median = (torch.searchsorted(upto, middle) + 0.5) * self._BIN
        return torch.where(upto[-1] > 0, median, torch.nan)


def _known(normals: Tensor) -> Tensor:
    return normals.square().sum(1) > 0.5


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean over the valid entries, without a synchronisation; 0 if there is none."""
    # where, not a product: what is not valid may be infinite
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
