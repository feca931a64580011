"""Multi-task models: one encoder and one head for each task, among them the paper's networks.

Importing this module needs only torch. The two dilated encoders import timm when they are called.
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
