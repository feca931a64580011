"""Sparse multi-task models: adaptive soft thresholds, an exact budget, task weights."""

from __future__ import annotations

from torch_adapmtl.allocation import GradientAllocation, LAMPAllocation, SensitivityAllocation
from torch_adapmtl.budget import SparsitySchedule
from torch_adapmtl.components import Components, PrunableTensor, find_components
from torch_adapmtl.finetune import keep_zeros, release_zeros
from torch_adapmtl.inference import (
    AcceleratedModel,
    AccelerationReport,
    LayerChoice,
    accelerate,
)
from torch_adapmtl.layers import Layer, Layers
from torch_adapmtl.methods import (
    ACDC,
    SNIP,
    ST3,
    STR,
    Adaptive,
    Controller,
    DiSparse,
    Feather,
    GraNet,
    IterativeMagnitude,
    Magnitude,
    MaskController,
    Method,
    Paper,
    RigL,
    Taylor,
    TopKAST,
)
from torch_adapmtl.model_size import LayerSize, ModelSize, size
from torch_adapmtl.prepare import apply_adapmtl
from torch_adapmtl.pruner import Pruner
from torch_adapmtl.run import (
    ComponentRow,
    History,
    LayerRow,
    RelativePerformance,
    Report,
    plain_state_dict,
    relative_performance,
    sparsity,
)
from torch_adapmtl.storage import (
    SparseFile,
    SparseFileError,
    StoredTensor,
    load_sparse,
    save_sparse,
)
from torch_adapmtl.tensor import (
    SoftThreshold,
    SoftThresholdPruning,
    soft_threshold,
    soft_threshold_unstructured,
)
from torch_adapmtl.weighting import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
    LossWeighting,
    StabilityWeighting,
)

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "SNIP",
    "ST3",
    "STR",
    "AcceleratedModel",
    "AccelerationReport",
    "Adaptive",
    "CallableWeighting",
    "ComponentRow",
    "Components",
    "Controller",
    "DiSparse",
    "EqualWeighting",
    "Feather",
    "FixedWeighting",
    "GraNet",
    "GradientAllocation",
    "History",
    "IterativeMagnitude",
    "LAMPAllocation",
    "Layer",
    "LayerChoice",
    "LayerRow",
    "LayerSize",
    "Layers",
    "LossWeighting",
    "Magnitude",
    "MaskController",
    "Method",
    "ModelSize",
    "Paper",
    "PrunableTensor",
    "Pruner",
    "RelativePerformance",
    "Report",
    "RigL",
    "SensitivityAllocation",
    "SoftThreshold",
    "SoftThresholdPruning",
    "SparseFile",
    "SparseFileError",
    "SparsitySchedule",
    "StabilityWeighting",
    "StoredTensor",
    "Taylor",
    "TopKAST",
    "accelerate",
    "apply_adapmtl",
    "find_components",
    "keep_zeros",
    "load_sparse",
    "plain_state_dict",
    "relative_performance",
    "release_zeros",
    "save_sparse",
    "size",
    "soft_threshold",
    "soft_threshold_unstructured",
    "sparsity",
]
