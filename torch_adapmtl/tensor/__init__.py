"""The soft threshold on one tensor: a function, a parametrization and a prune method."""

from __future__ import annotations

from torch_adapmtl.tensor.thresholding import SoftThreshold, soft_threshold
from torch_adapmtl.tensor.torch_prune import SoftThresholdPruning, soft_threshold_unstructured

__all__ = [
    "SoftThreshold",
    "SoftThresholdPruning",
    "soft_threshold",
    "soft_threshold_unstructured",
]
