"""Ways of pruning, and the controllers that they make."""

from __future__ import annotations

from torch_adapmtl.methods.disparse import DiSparse
from torch_adapmtl.methods.iterative import IterativeMagnitude
from torch_adapmtl.methods.magnitude import Magnitude
from torch_adapmtl.methods.saliency import SNIP, Taylor

__all__ = ["SNIP", "DiSparse", "IterativeMagnitude", "Magnitude", "Taylor"]
