"""Reports, diagnostics and checkpoints of a run; the sparsity and performance of a model."""

from __future__ import annotations

from torch_adapmtl.run.history import History
from torch_adapmtl.run.performance import RelativePerformance, relative_performance
from torch_adapmtl.run.plain import plain_state_dict
from torch_adapmtl.run.report import ComponentRow, LayerRow, Report
from torch_adapmtl.run.zeros import sparsity

__all__ = [
    "ComponentRow",
    "History",
    "LayerRow",
    "RelativePerformance",
    "Report",
    "plain_state_dict",
    "relative_performance",
    "sparsity",
]
