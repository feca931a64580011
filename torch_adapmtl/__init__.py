"""Sparse multi-task models: learned soft thresholds, an exact budget, adaptive task weights."""

from ._apply import apply_adapmtl
from .adaptive import GradientAllocation, SensitivityAllocation
from .budget import SparsitySchedule
from .groups import Components, PrunableTensor, find_components
from .paper import PaperMode
from .pruner import AdapMTL
from .report import ComponentRow, LayerRow, Report
from .thresholds import (
    SoftThreshold,
    SoftThresholdPruning,
    soft_threshold,
    soft_threshold_unstructured,
)

__version__ = "0.1.0"

__all__ = [
    "AdapMTL",
    "ComponentRow",
    "Components",
    "GradientAllocation",
    "LayerRow",
    "PaperMode",
    "PrunableTensor",
    "Report",
    "SensitivityAllocation",
    "SoftThreshold",
    "SoftThresholdPruning",
    "SparsitySchedule",
    "apply_adapmtl",
    "find_components",
    "soft_threshold",
    "soft_threshold_unstructured",
]
