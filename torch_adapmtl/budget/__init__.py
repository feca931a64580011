"""How many weights are zero: the schedule, the bounds, and the solver that meets them."""

from __future__ import annotations

from torch_adapmtl.budget.schedule import SparsitySchedule

__all__ = ["SparsitySchedule"]
