"""The layers of a run: prunable tensors with a soft threshold on each."""

from __future__ import annotations

from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer

__all__ = ["Layer", "Layers"]
