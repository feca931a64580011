"""Which tensors of a model belong to which tasks."""

from __future__ import annotations

from torch_adapmtl.components.find import Components, PrunableTensor, find_components

__all__ = ["Components", "PrunableTensor", "find_components"]
