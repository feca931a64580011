"""The methods, and the controllers that they make.

`Adaptive` is the default method, and `Paper` is the mechanism of AdapMTL as published. The others
are baselines, which use the same pruner, the same training loop and the same exact budget. The
baselines prune by masks, without shrinkage: a pruned weight gets no gradient and stays pruned,
unless the method documents otherwise, as `ST3`, `Feather` and `STR` do, which shrink weights by
thresholds. They end with exactly `round(target_sparsity * N)` zeros.
They do not guarantee a minimum number of weights in a layer.
"""

from __future__ import annotations

from torch_adapmtl.methods._base import Controller, Method
from torch_adapmtl.methods.adaptive import Adaptive
from torch_adapmtl.methods.alternating import ACDC
from torch_adapmtl.methods.disparse import DiSparse
from torch_adapmtl.methods.dynamic import GraNet, RigL
from torch_adapmtl.methods.iterative import IterativeMagnitude
from torch_adapmtl.methods.learned import STR
from torch_adapmtl.methods.magnitude import Magnitude
from torch_adapmtl.methods.masks import MaskController
from torch_adapmtl.methods.paper import Paper
from torch_adapmtl.methods.saliency import SNIP, Taylor
from torch_adapmtl.methods.shrinking import ST3, Feather
from torch_adapmtl.methods.top_kast import TopKAST

__all__ = [
    "ACDC",
    "SNIP",
    "ST3",
    "STR",
    "Adaptive",
    "Controller",
    "DiSparse",
    "Feather",
    "GraNet",
    "IterativeMagnitude",
    "Magnitude",
    "MaskController",
    "Method",
    "Paper",
    "RigL",
    "Taylor",
    "TopKAST",
]
