"""Names of components, and what a task may be called so that no component's name is ambiguous."""

from __future__ import annotations

__all__ = ["FROZEN", "RULE", "SHARED", "UNUSED", "is_task_name"]

SHARED = "shared"
UNUSED = "unused"
FROZEN = "frozen"
RULE = (
    f"names must not be empty, contain '+' or '.', or be one of {SHARED}, {UNUSED}, {FROZEN}, "
    "which stand for components"
)


def is_task_name(name: str) -> bool:
    """Whether a task can be called so."""
    return bool(name) and name not in (SHARED, UNUSED, FROZEN) and not set(name) & {"+", "."}
