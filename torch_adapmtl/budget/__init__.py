"""The number of zeros: its schedule, its bounds, and the solver that meets both."""

from __future__ import annotations

from torch_adapmtl.budget.schedule import SparsitySchedule

__all__ = ["SparsitySchedule"]
