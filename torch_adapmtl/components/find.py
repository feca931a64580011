"""Which prunable tensors belong to which component: found from the autograd graph, or given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_adapmtl.components._detect import detect, detect_each
from torch_adapmtl.components._inventory import Groups, Inventory, Selectors
from torch_adapmtl.components._outputs import (
    FROZEN,
    SHARED,
    UNUSED,
    TaskOutputs,
    check_task_name,
    named_tasks,
)
from torch_adapmtl.components._prunable import Prunable
from torch_adapmtl.components._unwrap import unwrap

__all__ = [
    "FROZEN",
    "SHARED",
    "UNUSED",
    "Components",
    "PrunableTensor",
    "find_components",
    "unwrap",
]


@dataclass(frozen=True, eq=False)
class PrunableTensor:
    """A parameter that can be pruned, and where it is used.

    Attributes:
        name: Its first qualified name in the model, such as `"encoder.conv1.weight"`; the name it
            is used by, so `weight` also where `torch.nn.utils.prune` keeps it as `weight_orig`.
        parameter: The parameter itself.
        owners: Every module that holds this very parameter, with the name it has there. Tied
            weights have several owners, among them modules of types that are not pruned themselves.
        component: `"shared"`, a task, several tasks as in `"depth+normal"`, a name from `groups=`,
            `"unused"` or `"frozen"`.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]
    component: str


@dataclass(frozen=True, eq=False)
class Components:
    """The prunable tensors of a multi-task model by the tasks that depend on them.

    `components[name]` gives the tensors of one component, `name in components` says whether it has
    any, and `str(components)` is a small table.

    Attributes:
        tasks: The tasks in declared order.
        tensors: All prunable tensors in the order of `model.parameters()`, each once.
    """

    tasks: tuple[str, ...]
    tensors: tuple[PrunableTensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The components that are pruned.

        Shared first, then the tasks, the partly shared ones and those that `groups=` named
        otherwise. Components without a tensor, `"unused"` and `"frozen"` are not among them.
        """
        present = dict.fromkeys(tensor.component for tensor in self.tensors)
        rank = {task: position for position, task in enumerate(self.tasks)}

        def key(name: str) -> tuple[int, list[int]]:
            parts = name.split("+")
            if name == SHARED:
                return 0, []
            if all(part in rank for part in parts):
                return min(len(parts), 2), [rank[part] for part in parts]
            return 3, []

        return tuple(sorted((n for n in present if n not in (UNUSED, FROZEN)), key=key))

    def __getitem__(self, component: str) -> tuple[PrunableTensor, ...]:
        chosen = tuple(tensor for tensor in self.tensors if tensor.component == component)
        if not chosen and component not in (SHARED, UNUSED, FROZEN, *self.tasks):
            raise KeyError(f"no component {component!r}; there are {', '.join(self.names)}")
        return chosen

    def __contains__(self, component: object) -> bool:
        return any(tensor.component == component for tensor in self.tensors)

    def __str__(self) -> str:
        pruned = sum(t.parameter.numel() for name in self.names for t in self[name])
        rows = [("component", "tensors", "weights", "share")]
        for name in (*self.names, *(n for n in (UNUSED, FROZEN) if n in self)):
            weights = sum(tensor.parameter.numel() for tensor in self[name])
            share = f"{100 * weights / pruned:.1f} %" if name in self.names and pruned else "dense"
            rows.append((name, f"{len(self[name])}", f"{weights:,}", share))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3))
            for row in rows
        )


def find_components(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    task_inputs: Mapping[str, Any] | None = None,
    task_outputs: TaskOutputs | None = None,
    groups: Groups | None = None,
    prunable: Prunable | None = None,
    exclude: Selectors = (),
) -> Components:
    """Sorts the prunable tensors of `model` into AdapMTL's components: shared, and one per task.

    The paper has one shared backbone and one head per task. Here a tensor belongs to the set of
    tasks whose output depends on it, whatever the architecture: all tasks make it `"shared"`, one
    makes it that task's, some make it partly shared, such as `"depth+normal"`. The model is run on
    example inputs, and the autograd graph is followed from each task's output to the parameters.
    It runs once in train mode. If no task depends on some weights then, it runs again in eval mode,
    and once more with `detach` and `no_grad` ignored. Afterwards the model is as it was; hooks that
    you put on it have seen those runs.

    Dependence is that of the graph. Where outputs are joined and sliced again, the joint part
    counts as shared; where parts are routed by the input, what these runs used counts.

    Tensors that no output reaches are `"unused"`. Those that are reached but not trained, because
    they do not require grad or because the model cuts them off with `detach`, `no_grad` or
    `inference_mode`, are `"frozen"`. Both stay dense, unless `groups` puts them somewhere.

    Args:
        model: The multi-task model; wrappers (`torch.compile`, DistributedDataParallel,
            DataParallel) are looked through. Its output is a mapping, named tuple, dataclass, tuple
            or list with an entry per task (in tuples and lists the tasks are `"0"`, `"1"`, ...),
            or what `task_outputs` says. An entry may be nested. Entries without tensors are
            ignored, and so is a scalar called `"loss"` beside the others.
        example_inputs: What the training loop gives the model: a tensor, a tuple of positional
            arguments or a dict of keyword arguments. By default two images are made for the timm
            or SMP encoder in the model.
        task_inputs: For a model that is called once for each task, as in `model(x, task)`: from
            task name to the example inputs of its call, in place of `example_inputs` and
            `task_outputs`. Whatever a call returns belongs to its task.
        task_outputs: Names for the entries of a tuple or list, or the keys that are tasks; or a
            mapping from task name to a callable, key or index that takes the task's tensors out of
            the output.
        groups: Components by hand, for all tensors or some: names, globs (`"heads.*"`), modules or
            parameters by component. A component may also be `"shared"`, several tasks joined by
            `"+"` (all of them joined are `"shared"`) or a name of its own. If `groups` covers
            everything, the model is not run, and the tasks are those of `task_outputs`, else the
            names in `groups`.
        prunable: Tensor names or globs by module type, added to the default; the most specific
            type counts, and `()` takes a type out. The default is `weight` of convolutions,
            transposed convolutions and `Linear`, with their subclasses, and the input projections
            of `MultiheadAttention`. A tensor under `torch.nn.utils.prune` counts as `weight`; one
            under `torch.nn.utils.parametrize` counts if it is made from one parameter of its
            shape, and is left out otherwise (weight normalisation has two).
        exclude: Names, globs, modules or parameters that are left out altogether.

    Returns:
        The components. Only real floating-point parameters are in them, tied ones once.

    Raises:
        ValueError: If the model has nothing to prune, is not multi-task, has an output without
            grad, is lazy or sharded, if a weight to prune is on the meta device, sparse, quantised
            or made in inference mode, if no example inputs can be made, or if `groups` or `exclude`
            match nothing or the same tensor twice.
        TypeError: If an argument is of the wrong kind; a scripted model is.
        RuntimeError: If the model fails on the example inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(4, 8)
        ...         self.heads = nn.ModuleDict({"left": nn.Linear(8, 1), "right": nn.Linear(8, 3)})
        ...
        ...     def forward(self, x):
        ...         return {task: head(self.body(x)) for task, head in self.heads.items()}
        >>> print(find_components(Net(), torch.randn(2, 4)))
        component  tensors  weights   share
        shared           1       32  50.0 %
        left             1        8  12.5 %
        right            1       24  37.5 %
    """
    model = unwrap(model)
    declared = _declared(task_inputs, example_inputs, task_outputs)
    groups = _checked(groups)
    inventory = Inventory(model, prunable, exclude)
    assigned = inventory.assign(groups)
    components: dict[int, str] = {}
    if len(assigned) == len(inventory.prunable):
        tasks = declared or _tasks_of(groups)
    else:
        open_keys = inventory.prunable.keys() - assigned.keys()
        if task_inputs is None:
            detection = detect(model, example_inputs, task_outputs, open_keys)
        else:
            detection = detect_each(model, task_inputs, open_keys)
        tasks = detection.tasks
        for key in open_keys:
            mask = detection.masks.get(key, 0)
            if not mask:
                components[key] = FROZEN if key in detection.cut_off else UNUSED
            elif not inventory.prunable[key].parameter.requires_grad:
                components[key] = FROZEN
            else:
                components[key] = _component(tasks, mask)
    for key, group in assigned.items():
        components[key] = _group_component(tasks, group)
    found = Components(
        tasks,
        tuple(
            PrunableTensor(e.names[0], e.parameter, tuple(e.owners), components[key])
            for key, e in inventory.prunable.items()
        ),
    )
    if not found.names:
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: of its prunable tensors "
            f"{len(found[FROZEN])} are frozen and {len(found[UNUSED])} unused; let some require "
            "grad, or name what to prune with groups="
        )
    return found


def _declared(
    task_inputs: Mapping[str, Any] | None, example_inputs: Any, task_outputs: TaskOutputs | None
) -> tuple[str, ...]:
    if task_inputs is None:
        return named_tasks(task_outputs)
    for name, value in (("example_inputs", example_inputs), ("task_outputs", task_outputs)):
        if value is not None:
            raise ValueError(
                f"task_inputs says how the model is called for each task, and {name} how it is "
                f"called for all: pass one of the two"
            )
    given: object = task_inputs
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"task_inputs must map each task to the example inputs of its call, found "
            f"{task_inputs!r}"
        )
    return tuple(check_task_name(name, "task_inputs") for name in task_inputs)


def _checked(groups: Groups | None) -> Groups:
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


def _tasks_of(groups: Groups) -> tuple[str, ...]:
    tasks = dict.fromkeys(part for name in groups if name != SHARED for part in name.split("+"))
    if not tasks:
        raise ValueError(
            'groups puts everything into "shared" and so names no task; name the tasks with '
            'task_outputs=["name", ...], or the one component otherwise: groups={"main": ["*"]}'
        )
    return tuple(tasks)


def _component(tasks: tuple[str, ...], mask: int) -> str:
    if len(tasks) > 1 and mask == (1 << len(tasks)) - 1:
        return SHARED
    return "+".join(task for bit, task in enumerate(tasks) if mask >> bit & 1)


def _group_component(tasks: tuple[str, ...], group: str) -> str:
    parts = group.split("+")
    if len(parts) == 1:
        return group
    if unknown := [part for part in parts if part not in tasks]:
        raise ValueError(
            f"groups[{group!r}]: {unknown[0]!r} is not a task; the tasks are {', '.join(tasks)}"
        )
    return _component(tasks, sum({1 << tasks.index(part) for part in parts}))
