"""Dense tasks, with a value for every pixel: segmentation, depth, normals and other maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from torch_adapmtl.tasks._base import DenseTask
from torch_adapmtl.tasks._metrics import Mean, MedianAngle

__all__ = ["Depth", "Map", "Normals", "Segmentation"]

_RATIOS = {"within_1.25": 1.25, "within_1.25^2": 1.25**2, "within_1.25^3": 1.25**3}
_ANGLES = {"within_11.25": 11.25, "within_22.5": 22.5, "within_30": 30.0}


class Segmentation(DenseTask):
    """Semantic segmentation. Loss: cross-entropy. Metrics: mIoU and pixel accuracy, in percent.

    Prediction: logits `(B, C, H, W)`. Target: classes `(B, H, W)`, int64. `"mIoU"` is the mean over
    the classes that occur in a target or a prediction.

    Args:
        classes: Number of classes, C.
        ignore_index: The target's value for unknown pixels.
        class_weights: Weight of each class in the cross-entropy, `(C,)`, as
            [`TinyTaskonomy`][torch_adapmtl.datasets.TinyTaskonomy] has them.
        metrics: Some of `"mIoU"`, `"pixel_accuracy"` (the default, as for NYU-v2) and
            `"cross_entropy"` (as for Tiny-Taskonomy).

    Raises:
        ValueError: If a metric is unknown, or `class_weights` does not hold one finite number >= 0
            for each class.

    Example:
        >>> import torch
        >>> task = Segmentation(2)
        >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]])
        >>> task.update(logits, torch.tensor([[[0, 255]]]))
        >>> task.compute()
        {'mIoU': 100.0, 'pixel_accuracy': 100.0}
    """

    lower_is_better = frozenset({"cross_entropy"})
    _default_metrics = ("mIoU", "pixel_accuracy")
    _same_channels = False

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

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {
            "mIoU": MulticlassJaccardIndex(self.classes, ignore_index=self.ignore_index),
            "pixel_accuracy": MulticlassAccuracy(
                self.classes, average="micro", ignore_index=self.ignore_index
            ),
            "cross_entropy": Mean(),
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        total, weight = self._weighted_sums(prediction, target)
        return total / weight.clamp(min=1e-12)

    def _weighted_sums(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the weighted cross-entropies of all valid pixels, and that of the weights."""
        valid = target != self.ignore_index
        weights = self.class_weights
        if weights is not None:
            # Weights that are cast in inference mode could not be trained with afterwards.
            with torch.inference_mode(False):
                weights = weights.to(prediction.device, prediction.dtype)
            self.class_weights = weights  # so that they are copied to the device only once
        each = F.cross_entropy(
            prediction, target, weight=weights, ignore_index=self.ignore_index, reduction="none"
        )
        weight = valid if weights is None else weights[target.where(valid, 0)] * valid
        return each.sum(), weight.sum()

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        return {
            "mIoU": (prediction, target),
            "pixel_accuracy": (prediction, target),
            "cross_entropy": self._weighted_sums(prediction, target),
        }

    def _scale(self, name: str) -> float:
        return 1.0 if name == "cross_entropy" else 100.0


class Depth(DenseTask):
    """Depth. Loss: L1. Metrics: absolute and relative error, and shares of pixels within a ratio.

    Prediction and target `(B, 1, H, W)`; a target of 0 is unknown. `"abs_error"` is in the target's
    unit, `"rel_error"` a fraction of the target. `"within_1.25"`, `"within_1.25^2"` and
    `"within_1.25^3"` are the percentages of pixels where both prediction / target and
    target / prediction are below that number.

    Args:
        metrics: Some of these five; None for all.

    Raises:
        ValueError: If a metric is unknown.

    Example:
        >>> import torch
        >>> task = Depth(metrics=["abs_error", "within_1.25"])
        >>> task.update(
        ...     torch.tensor([[[[2.0, 4.0, 9.0]]]]), torch.tensor([[[[2.0, 3.0, 0.0]]]])
        ... )
        >>> task.compute()
        {'abs_error': 0.5, 'within_1.25': 50.0}
    """

    lower_is_better = frozenset({"abs_error", "rel_error"})
    _default_metrics = ("abs_error", "rel_error", *_RATIOS)

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {
            "abs_error": MeanAbsoluteError(),
            "rel_error": MeanAbsolutePercentageError(),
            **{name: Mean() for name in _RATIOS},
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _mean_of_valid((prediction - target).abs(), target > 0)

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        valid = target > 0
        predicted, true = prediction[valid], target[valid]
        ratio = torch.maximum(predicted / true, true / predicted)
        ratio = torch.where(predicted > 0, ratio, torch.inf)  # a depth <= 0 is within no ratio
        return {
            "abs_error": (predicted, true),
            "rel_error": (predicted, true),
            **{name: ((ratio < most).float(),) for name, most in _RATIOS.items()},
        }

    def _scale(self, name: str) -> float:
        return 100.0 if name in _RATIOS else 1.0


class Normals(DenseTask):
    """Surface normals. Loss: 1 - cosine. Metrics: angles in degrees, shares below some in percent.

    Prediction `(B, 3, H, W)`, of any length; target of the same shape, of unit length, and 0 where
    unknown. The median angle is exact to 0.01 degrees. A prediction of 0 has no direction and
    counts as 90 degrees off; one that is not finite counts as 180 degrees off.

    Args:
        metrics: Some of `"angle_mean"`, `"angle_median"`, `"within_11.25"`, `"within_22.5"`,
            `"within_30"` (the default, as for NYU-v2) and `"cosine"`, the mean cosine of the angle
            (as for Tiny-Taskonomy).

    Raises:
        ValueError: If a metric is unknown.

    Example:
        >>> import torch
        >>> task = Normals(metrics=["angle_mean", "within_30"])
        >>> up, right = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> prediction = torch.stack([up, up], dim=1).view(1, 3, 1, 2)
        >>> task.update(prediction, torch.stack([up, right], dim=1).view(1, 3, 1, 2))
        >>> task.compute()
        {'angle_mean': 45.0, 'within_30': 50.0}
    """

    lower_is_better = frozenset({"angle_mean", "angle_median"})
    _default_metrics = ("angle_mean", "angle_median", *_ANGLES)

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {
            "angle_mean": Mean(),
            "angle_median": MedianAngle(),
            **{name: Mean() for name in _ANGLES},
            "cosine": Mean(),
        }

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = _known_normals(target)
        target = torch.where(valid[:, None], target, 0.0)  # a NaN would reach the gradient
        return _mean_of_valid(1 - F.cosine_similarity(prediction, target, dim=1), valid)

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        valid = _known_normals(target)
        predicted = F.normalize(prediction, dim=1).movedim(1, -1)[valid]
        true = F.normalize(target, dim=1).movedim(1, -1)[valid]
        cosine = (predicted * true).sum(-1)
        # The arc cosine would lose half the digits of a small angle.
        angle = torch.atan2(torch.linalg.cross(predicted, true).norm(dim=-1), cosine).rad2deg()
        # atan2(0, 0) is 0, so a head that outputs only zeros would count as perfect.
        angle = angle.where(predicted.any(-1), 90.0).nan_to_num(180.0)
        return {
            "angle_mean": (angle,),
            "angle_median": (angle,),
            "cosine": (cosine.nan_to_num(-1.0),),
            **{name: ((angle < most).float(),) for name, most in _ANGLES.items()},
        }

    def _scale(self, name: str) -> float:
        return 100.0 if name in _ANGLES else 1.0


class Map(DenseTask):
    """Any other map, such as edges or keypoints. Loss and metric (`"abs_error"`): L1.

    Prediction and target `(B, C, H, W)`; a target of NaN is unknown.

    Example:
        >>> import torch
        >>> task = Map()
        >>> target = torch.tensor([[[[1.0, torch.nan]]]])
        >>> task.loss(torch.zeros(1, 1, 1, 2), target)
        tensor(1.)
    """

    lower_is_better = frozenset({"abs_error"})
    _default_metrics = ("abs_error",)

    def _make_metrics(self) -> Mapping[str, Metric]:
        return {"abs_error": MeanAbsoluteError()}

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _mean_of_valid((prediction - target.nan_to_num()).abs(), ~target.isnan())

    def _metric_inputs(
        self, prediction: Tensor, target: Tensor
    ) -> Mapping[str, tuple[Tensor, ...]]:
        valid = ~target.isnan()
        return {"abs_error": (prediction[valid], target[valid])}


def _known_normals(normals: Tensor) -> Tensor:
    """Where `(B, 3, H, W)` holds a unit normal and not 0 or NaN, `(B, H, W)`."""
    return normals.square().sum(1) > 0.5


def _mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    """The mean over the valid entries; 0 if there are none. It does not wait for the device."""
    # Not values * valid: an invalid value may be infinite, and inf * 0 is NaN.
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
