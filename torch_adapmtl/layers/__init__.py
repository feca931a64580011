"""The layers of a run: prunable tensors, each with a soft threshold."""

from __future__ import annotations

from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer

__all__ = ["Layer", "Layers"]
