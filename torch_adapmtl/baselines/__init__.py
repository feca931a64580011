"""What AdapMTL is compared with, under the same handle, loop and exact budget.

Each is passed as `mode` to [`apply_adapmtl`][torch_adapmtl.apply_adapmtl]; the loss weighting is
still that of `weighting=`. All put hard masks on the weights, without shrinkage: a pruned weight
gets no gradient and stays pruned unless said otherwise. All end with exactly
`round(target_sparsity * N)` zeros; none keeps a floor of weights.
"""

from __future__ import annotations

from ._disparse import DiSparse
from ._iterative import IterativeMagnitude
from ._magnitude import Magnitude
from ._saliency import SNIP, Taylor

__all__ = ["SNIP", "DiSparse", "IterativeMagnitude", "Magnitude", "Taylor"]
