"""Sparse multi-task models: adaptive soft thresholds, an exact budget, adaptive task weights."""

from torch_adapmtl.prepare import apply_adapmtl
from torch_adapmtl.methods.adaptive import GradientAllocation
from torch_adapmtl.budget.solver import SparsitySchedule
from torch_adapmtl.components.find import Components, PrunableTensor, find_components
from torch_adapmtl.finetune import keep_zeros, release_zeros
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.methods.paper import PaperMode
from torch_adapmtl.pruner import AdapMTL
from torch_adapmtl.tensor.torch_prune import SoftThresholdPruning, soft_threshold_unstructured
from torch_adapmtl.run.report import ComponentRow, LayerRow, Report
from torch_adapmtl.allocation.sensitivity import SensitivityAllocation
from torch_adapmtl.tensor.soft_threshold import SoftThreshold, soft_threshold
from torch_adapmtl.weighting.simple import (
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
