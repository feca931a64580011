"""Loss weightings: the sliding-window stability of AdapMTL, and simple alternatives.

Every weighting maps `{task: scalar loss}` to one scalar that is differentiable in the losses. The
weights are detached and sum to the number of tasks T. They are computed on the device of the
weighting's buffers, without waiting for it.
"""

from __future__ import annotations

from torch_adapmtl.weighting._base import LossWeighting
from torch_adapmtl.weighting.simple import CallableWeighting, EqualWeighting, FixedWeighting
from torch_adapmtl.weighting.stability import StabilityWeighting

__all__ = [
    "CallableWeighting",
    "EqualWeighting",
    "FixedWeighting",
    "LossWeighting",
    "StabilityWeighting",
]
