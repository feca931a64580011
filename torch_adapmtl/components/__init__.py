"""Which tensors of a model belong to which tasks."""

from torch_adapmtl.components.find import Components, PrunableTensor, find_components

__all__ = ["Components", "PrunableTensor", "find_components"]
