"""Checks of the numbers that users give."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["check_fraction", "check_steps"]


def check_fraction(name: str, value: object) -> float:
    """Return `value` as a float if it is a fraction; `name` is for the error."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    fraction = float(value) if number else math.nan  # type: ignore[arg-type]
    if not 0.0 <= fraction < 1.0:
        hint = "; 90 % is 0.9" if fraction >= 1.0 else ""
        raise ValueError(f"{name} must be a fraction in [0, 1), got {value!r}{hint}")
    return fraction


def check_steps(value: object) -> int:
    """Return `value` as a number of steps if it can be one."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"total_steps must be an integer >= 1, got {value!r}")
    return int(value)
