"""Splitting what a model returns into tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = [
    "FROZEN",
    "RULE",
    "SHARED",
    "UNUSED",
    "OutputError",
    "TaskOutputs",
    "check_task_name",
    "is_task_name",
    "named_tasks",
    "split_output",
]

SHARED = "shared"
UNUSED = "unused"
FROZEN = "frozen"
RULE = (
    f"names must not be empty, contain '+' or '.', or be one of {SHARED}, {UNUSED}, {FROZEN}, "
    "which stand for components"
)

# How a user may say what the tasks' outputs are.
TaskOutputs = Sequence[str] | Mapping[str, Callable[[Any], Any] | str | int]


class OutputError(ValueError):
    """The model ran, but its output is not what the caller said or needs."""


def is_task_name(name: str) -> bool:
    """Whether a task can be called so."""
    return bool(name) and name not in (SHARED, UNUSED, FROZEN) and not set(name) & {"+", "."}


def check_task_name(name: object, argument: str) -> str:
    """Returns `name` if a task can be called so, else raises a `ValueError` naming `argument`."""
    if not isinstance(name, str):
        raise OutputError(
            f"{argument}: a task name must be a string, found {name!r} ({type(name).__name__}); "
            f'name the tasks with task_outputs={{"name": {name!r}, ...}}'
        )
    if not is_task_name(name):
        raise OutputError(
            f"{argument}: {name!r} cannot be a task name: {RULE}; rename it, or give names with "
            "task_outputs="
        )
    return name


def named_tasks(task_outputs: TaskOutputs | None) -> tuple[str, ...]:
    """The task names that `task_outputs` declares, checked; none if it is None."""
    if task_outputs is None:
        return ()
    if isinstance(task_outputs, str) or not isinstance(task_outputs, Sequence | Mapping):
        raise TypeError(
            "task_outputs must be a sequence of task names or a mapping from task name to a "
            f"callable, key or index, found {type(task_outputs).__name__}"
        )
    names = tuple(check_task_name(name, "task_outputs") for name in task_outputs)
    if not names:
        raise ValueError("task_outputs is empty; name at least one task or leave it out")
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"task_outputs names {repeated[0]!r} twice; task names must be distinct")
    return names


def split_output(output: Any, task_outputs: TaskOutputs | None) -> dict[str, list[Tensor]]:
    """The tensors of each task, in declared order.

    Raises:
        OutputError: If the output cannot be split, or a task named by the user has no tensor.
    """
    if task_outputs is None:
        return _by_structure(output)
    names = named_tasks(task_outputs)
    parts = {}
    for position, name in enumerate(names):
        if isinstance(task_outputs, Mapping):
            part = _select(output, task_outputs[name], name)
        else:
            part = _by_name(output, name, position, names)
        parts[name] = list(_tensors(part))
        if not parts[name]:
            raise OutputError(
                f"task_outputs: the output of task {name!r} holds no tensor (found "
                f"{_kind(part)}); name only outputs that a loss is computed from"
            )
    return parts


def _by_structure(output: Any) -> dict[str, list[Tensor]]:
    fields = _fields(output)
    if fields is None:
        raise OutputError(
            f"the model returns {_kind(output)}, so it does not look multi-task. If its output is "
            'split into tasks later, say how: task_outputs={"name": lambda output: ..., ...}; to '
            'prune it as one component, pass groups={"main": ["*"]}'
        )
    parts = {name: tensors for name, part in fields.items() if (tensors := list(_tensors(part)))}
    # Hugging Face models add up their own loss beside the outputs when they are given labels.
    if len(parts) > 1 and isinstance(total := fields.get("loss"), Tensor) and total.dim() == 0:
        del parts["loss"]
    for name in parts:
        check_task_name(name, "the model's output")
    if len(parts) < 2:
        raise OutputError(
            f"the model returns {_several(parts)} only, so it is not multi-task. If its output is "
            'split into tasks later, say how: task_outputs={"name": lambda output: ..., ...}; to '
            'prune it as one component, pass groups={"main": ["*"]}'
        )
    return parts


def _kind(output: Any) -> str:
    return "one tensor" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _several(parts: Mapping[str, object]) -> str:
    return f"one output ({', '.join(map(repr, parts))})" if parts else "no tensor"


def _fields(output: Any) -> dict[Any, Any] | None:
    """The entries of a structured output by name, or None if it has none."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return {str(position): part for position, part in enumerate(output)}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return None


def _by_name(output: Any, name: str, position: int, names: Sequence[str]) -> Any:
    """The entry called `name`, or the one at its place in a tuple or list of the same length."""
    fields = _fields(output)
    if fields is not None and all(other in fields for other in names):
        return fields[name]
    if fields is None or isinstance(output, Mapping):
        found = f"keys {list(output)}" if isinstance(output, Mapping) else _kind(output)
        raise OutputError(
            f"task_outputs names the tasks {list(names)}, but the model returns {found}; name its "
            'keys, or say how to split it: task_outputs={"name": lambda output: ..., ...}'
        )
    if len(fields) != len(names):
        raise OutputError(
            f"task_outputs names {len(names)} tasks, but the model returns {len(fields)} outputs; "
            'name each of them in order, or pick some by index: task_outputs={"name": 0, ...}'
        )
    return list(fields.values())[position]


def _select(output: Any, selector: Callable[[Any], Any] | str | int, name: str) -> Any:
    if callable(selector):
        try:
            return selector(output)
        except Exception as error:
            raise OutputError(
                f"task_outputs: the function of task {name!r} failed on the model's output "
                f"({_kind(output)}): {type(error).__name__}: {error}"
            ) from error
    try:
        if isinstance(selector, str) and not isinstance(output, Mapping):
            return getattr(output, selector)
        return output[selector]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise OutputError(
            f"task_outputs: task {name!r} is to be found at {selector!r}, but the model's output "
            f"({_kind(output)}) has nothing there"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested output, also in the attributes of objects such as distributions."""
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if isinstance(item, str | bytes | int | float | type | nn.Module) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, tuple | list | set | frozenset):
            stack.extend(item)
        elif isinstance(getattr(item, "__dict__", None), dict) and not callable(item):
            stack.extend(vars(item).values())
