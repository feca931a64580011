"""The allocation of the zeros to the layers, by their offsets."""

from __future__ import annotations

from torch_adapmtl.allocation._base import Allocation
from torch_adapmtl.allocation.gradient import GradientAllocation
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.allocation.sensitivity import SensitivityAllocation

__all__ = ["Allocation", "GradientAllocation", "LAMPAllocation", "SensitivityAllocation"]
