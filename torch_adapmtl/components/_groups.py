"""The components that `groups=` names, and those of tasks."""

from __future__ import annotations

from collections.abc import Mapping

from torch_adapmtl._checks import outputs_named_like
from torch_adapmtl.components._inventory import Groups
from torch_adapmtl.components._outputs import SHARED, check_task_name

__all__ = ["checked_groups", "component_of_group", "component_of_tasks", "tasks_of"]


def checked_groups(groups: Groups | None) -> Groups:
    """Return `groups`, empty if it is None.

    Raises:
        TypeError: If it is not of the form that `find_components` takes.
        ValueError: If a component has an invalid name.
    """
    if groups is None:
        return {}
    if not isinstance(groups, Mapping):
        raise TypeError(
            "groups must map component names to names, globs, modules or parameters, found "
            f"{type(groups).__name__}"
        )
    for name in groups:
        if name != SHARED:
            if not isinstance(name, str):
                raise TypeError(f"groups: a component's name must be a string, found {name!r}")
            for part in name.split("+"):
                check_task_name(part, f"groups[{name!r}]")
    return groups


def tasks_of(groups: Groups) -> tuple[str, ...]:
    """Return the tasks that the names of the groups consist of."""
    tasks = dict.fromkeys(part for name in groups if name != SHARED for part in name.split("+"))
    if not tasks:
        raise ValueError(
            'groups puts everything into "shared" and so names no task; name the tasks with '
            'task_outputs=["name", ...], or the one component otherwise: groups={"main": ["*"]}'
        )
    return tuple(tasks)


def component_of_tasks(tasks: tuple[str, ...], mask: int) -> str:
    """Return the component of the tasks whose bits are set."""
    if len(tasks) > 1 and mask == (1 << len(tasks)) - 1:
        return SHARED
    return "+".join(task for bit, task in enumerate(tasks) if mask >> bit & 1)


def component_of_group(tasks: tuple[str, ...], group: str) -> str:
    """Return the component of a group: joined tasks in declared order, other names as they are."""
    parts = group.split("+")
    if len(parts) == 1:
        return group
    if unknown := [part for part in parts if part not in tasks]:
        rename = outputs_named_like(unknown, tasks, rest=True)
        raise ValueError(
            f"groups[{group!r}]: {unknown[0]!r} is not a task; the tasks are {', '.join(tasks)}"
            + (f"; to rename them, pass {rename}" if rename else "")
        )
    return component_of_tasks(tasks, sum({1 << tasks.index(part) for part in parts}))
