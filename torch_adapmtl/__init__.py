"""Sparse multi-task models: adaptive soft thresholds, an exact budget, adaptive task weights."""

from ._apply import apply_adapmtl
from .adaptive import GradientAllocation
from .budget import SparsitySchedule
from .groups import Components, PrunableTensor, find_components
from .keeping import keep_zeros, release_zeros
from .lamp import LAMPAllocation
from .paper import PaperMode
from .pruner import AdapMTL
from .pruning import SoftThresholdPruning, soft_threshold_unstructured
from .report import ComponentRow, LayerRow, Report
from .sensitivity import SensitivityAllocation
from .thresholds import SoftThreshold, soft_threshold
from .weighting import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
    LossWeighting,
    StabilityWeighting,
)

__version__ = "0.1.0"

__all__ = [
    "AdapMTL",
    "CallableWeighting",
    "ComponentRow",
    "Components",
    "EqualWeighting",
    "FixedWeighting",
    "GradientAllocation",
    "LAMPAllocation",
    "LayerRow",
    "LossWeighting",
    "PaperMode",
    "PrunableTensor",
    "Report",
    "SensitivityAllocation",
    "SoftThreshold",
    "SoftThresholdPruning",
    "SparsitySchedule",
    "StabilityWeighting",
    "apply_adapmtl",
    "find_components",
    "keep_zeros",
    "release_zeros",
    "soft_threshold",
    "soft_threshold_unstructured",
]
