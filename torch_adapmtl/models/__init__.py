"""Multi-task models: one encoder, one head per task, and the paper's networks.

Only torch is needed to import this package. The two dilated encoders build on timm, which is
imported when they are called.
"""

from __future__ import annotations

from torch_adapmtl.models._encoders import (
    dilated_mobilenet_v2,
    dilated_resnet34,
    feature_channels,
)
from torch_adapmtl.models._heads import ASPPHead, ClassificationHead, DenseHead, RegressionHead
from torch_adapmtl.models.multitask import MultiTaskModel

__all__ = [
    "ASPPHead",
    "ClassificationHead",
    "DenseHead",
    "MultiTaskModel",
    "RegressionHead",
    "dilated_mobilenet_v2",
    "dilated_resnet34",
    "feature_channels",
]
