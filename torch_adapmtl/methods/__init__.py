"""Ways of pruning, and the controllers that they make.

`Adaptive` is the default, `Paper` the mechanism of AdapMTL as published; the others are baselines
under the same pruner, loop and exact budget. The baselines put hard masks on the weights, without
shrinkage: a pruned weight gets no gradient and stays pruned unless said otherwise. They end with
exactly `round(target_sparsity * N)` zeros, and keep no floor of weights in a layer.
"""

from __future__ import annotations

from torch_adapmtl.methods._base import Controller, Method
from torch_adapmtl.methods.adaptive import Adaptive
from torch_adapmtl.methods.disparse import DiSparse
from torch_adapmtl.methods.iterative import IterativeMagnitude
from torch_adapmtl.methods.magnitude import Magnitude
from torch_adapmtl.methods.masks import MaskController
from torch_adapmtl.methods.paper import Paper
from torch_adapmtl.methods.saliency import SNIP, Taylor

__all__ = [
    "SNIP",
    "Adaptive",
    "Controller",
    "DiSparse",
    "IterativeMagnitude",
    "Magnitude",
    "MaskController",
    "Method",
    "Paper",
    "Taylor",
]
