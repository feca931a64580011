"""Weights of the task losses: the sliding-window stability of AdapMTL, and plain alternatives.

Every weighting maps `{task: scalar loss}` to one scalar that is differentiable in the losses. The
weights themselves are detached, sum to the number of tasks T, and are computed where their buffers
live, without the host waiting for the device.
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
