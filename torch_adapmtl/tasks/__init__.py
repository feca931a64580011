"""The paper's tasks, and classification: losses over the valid pixels, and its tables' metrics."""

from __future__ import annotations

from torch_adapmtl.tasks.tasks import (
    Classification,
    Depth,
    Map,
    Normals,
    Regression,
    Segmentation,
    Task,
)

__all__ = ["Classification", "Depth", "Map", "Normals", "Regression", "Segmentation", "Task"]
