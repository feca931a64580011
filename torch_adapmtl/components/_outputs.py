"""Splitting a model's output into tasks, and the names of tasks and components."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch_adapmtl._checks import outputs_named_like

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

TaskOutputs = Sequence[str] | Mapping[str, Callable[[Any], Any] | str | int]

_ONE_TASK_REMEDY = (
    'If its output is split into tasks later, say how: task_outputs={"name": lambda output: ..., '
    '...}; to prune it as one component, pass groups={"main": ["*"]}'
)


class OutputError(ValueError):
    """The model runs, but its output does not split into tasks as it should."""


def is_task_name(name: str) -> bool:
    """Return whether a task may be called `name`."""
    return bool(name) and name not in (SHARED, UNUSED, FROZEN) and not set(name) & {"+", "."}


def check_task_name(name: object, argument: str) -> str:
    """Return `name` if a task may be called so.

    Raises:
        OutputError: If not; it says that the name is from `argument`.
    """
    if not isinstance(name, str):
        raise OutputError(
            f"{argument}: a task name must be a string, found {name!r} ({type(name).__name__}); "
            f'name the tasks with task_outputs={{"name": {name!r}, ...}}'
        )
    if not is_task_name(name):
        raise OutputError(
            f"{argument}: {name!r} cannot be a task name: {RULE}; rename it, or name the tasks "
            "with task_outputs="
        )
    return name


def named_tasks(task_outputs: TaskOutputs | None) -> tuple[str, ...]:
    """Return the task names in `task_outputs`; none if it is None.

    Raises:
        TypeError: If it is not of the form that `find_components` takes.
        ValueError: If it is empty, or a name is invalid or occurs twice.
    """
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
    """Return the tensors of each task, in declared order.

    Args:
        output: What the model returned.
        task_outputs: How it splits into tasks, as in `find_components`.

    Raises:
        OutputError: If it cannot be split, or a task in `task_outputs` has no tensor.
    """
    if task_outputs is None:
        return _split_by_structure(output)
    names = named_tasks(task_outputs)
    tensors = {}
    for position, name in enumerate(names):
        if isinstance(task_outputs, Mapping):
            part = _select(output, task_outputs[name], name)
        else:
            part = _entry(output, name, position, names)
        tensors[name] = list(_tensors(part))
        if not tensors[name]:
            raise OutputError(
                f"task_outputs: the output of task {name!r} holds no tensor (found "
                f"{_describe(part)}); name only outputs that a loss is computed from"
            )
    return tensors


def _split_by_structure(output: Any) -> dict[str, list[Tensor]]:
    """Split an output whose entries are the tasks."""
    entries = _entries(output)
    if entries is None:
        raise OutputError(
            f"the model returns {_describe(output)}, so it does not look multi-task. "
            f"{_ONE_TASK_REMEDY}"
        )
    _check_nesting(output, entries)
    tensors = {name: found for name, entry in entries.items() if (found := list(_tensors(entry)))}
    # Given labels, Hugging Face models return their own loss beside the outputs.
    loss = entries.get("loss")
    if len(tensors) > 1 and isinstance(loss, Tensor) and loss.dim() == 0:
        del tensors["loss"]
    for name in tensors:
        check_task_name(name, "the model's output")
    if len(tensors) < 2:
        returned = f"one output ({', '.join(map(repr, tensors))}) only" if tensors else "no tensor"
        raise OutputError(
            f"the model returns {returned}, so it is not multi-task. {_ONE_TASK_REMEDY}"
        )
    return tensors


def _check_nesting(output: Any, entries: Mapping[Any, Any]) -> None:
    """Raise an `OutputError` if the tasks seem to be the entries of an entry of the output.

    A position is no name: where a tuple holds features or a loss beside the tasks, each of its
    entries would count as a task. Named entries count as the tasks unless there is only one.
    """
    full = {name: entry for name, entry in entries.items() if list(_tensors(entry))}
    inner = {}
    for name, entry in full.items():
        if isinstance(entry, Mapping) or _is_record(entry):
            found = [key for key, part in (_entries(entry) or {}).items() if list(_tensors(part))]
            inner[name] = [key for key in found if isinstance(key, str) and is_task_name(key)]
    by_position = isinstance(output, tuple | list) and not hasattr(output, "_fields")
    if len(inner) != 1 or not (by_position or len(full) == 1):
        return
    ((name, keys),) = inner.items()
    if len(keys) < 2:
        return
    entry = full[name]
    outer = f"[{name}]" if by_position else _access(output, name)
    selectors = ", ".join(f'"{k}": lambda output: output{outer}{_access(entry, k)}' for k in keys)
    otherwise = ""
    if len(full) > 1:
        otherwise = '; if the entries of the whole are the tasks, name them: task_outputs=["...", '
        otherwise += "...]"
    raise OutputError(
        f"the model returns {_describe(output)} whose entry {name!r} is {_describe(entry)} of "
        f"{', '.join(map(repr, keys))}. If these are the tasks, say so: "
        f"task_outputs={{{selectors}}}{otherwise}"
    )


def _access(container: Any, name: str) -> str:
    """Return the code that selects an entry."""
    return f'["{name}"]' if isinstance(container, Mapping) else f".{name}"


def _is_record(value: Any) -> bool:
    """Return whether a value is a named tuple or a dataclass."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    return named or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _describe(output: Any) -> str:
    return "one tensor" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _entries(output: Any) -> dict[Any, Any] | None:
    """Return the entries of a structured output by name, or None if it has none."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return {str(position): entry for position, entry in enumerate(output)}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return None


def _entry(output: Any, name: str, position: int, names: Sequence[str]) -> Any:
    """Return the entry called `name`, or the one at `position` of a tuple or list."""
    entries = _entries(output)
    if entries is not None and all(other in entries for other in names):
        return entries[name]
    if entries is None or isinstance(output, Mapping):
        returned = f"keys {list(output)}" if isinstance(output, Mapping) else _describe(output)
        split = outputs_named_like(names, map(str, entries or ()), rest=False)
        split = split or 'task_outputs={"name": lambda output: ..., ...}'
        raise OutputError(
            f"task_outputs names the tasks {list(names)}, but the model returns {returned}; name "
            f"its keys, or say how to split it: {split}"
        )
    if len(entries) != len(names):
        raise OutputError(
            f"task_outputs names {len(names)} tasks, but the model returns {len(entries)} outputs; "
            'name each of them in order, or pick some by index: task_outputs={"name": 0, ...}'
        )
    return list(entries.values())[position]


def _select(output: Any, selector: Callable[[Any], Any] | str | int, name: str) -> Any:
    """Return the part of the output that a callable, key, attribute or index selects."""
    if callable(selector):
        try:
            return selector(output)
        except Exception as error:
            raise OutputError(
                f"task_outputs: the function of task {name!r} failed on the model's output "
                f"({_describe(output)}): {type(error).__name__}: {error}"
            ) from error
    try:
        if isinstance(selector, str) and not isinstance(output, Mapping):
            return getattr(output, selector)
        return output[selector]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        keys = [str(key) for key in _entries(output) or ()]
        similar = outputs_named_like([str(selector)], keys, rest=False)
        there = f"; there is {', '.join(map(repr, keys))}" if keys else ""
        raise OutputError(
            f"task_outputs: task {name!r} is at {selector!r}, but the model's output "
            f"({_describe(output)}) has nothing there{there}; name a key, attribute or index of it"
            + (f", as in {similar}" if similar else "")
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested output and of objects in it, such as distributions."""
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
