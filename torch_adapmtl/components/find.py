"""Sorting the prunable tensors of a model into components."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_adapmtl._tables import details, html_table, text_table
from torch_adapmtl.components._detect import detect, detect_each, observe_use
from torch_adapmtl.components._groups import (
    checked_groups,
    component_of_group,
    component_of_tasks,
    tasks_of,
)
from torch_adapmtl.components._inventory import Groups, Inventory, Selectors
from torch_adapmtl.components._misuse import check_use
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
    """A prunable tensor of a model and the component that it belongs to.

    Attributes:
        name: The first qualified name under which the model uses it, such as
            `"encoder.conv1.weight"`. It ends in `weight` also where `torch.nn.utils.prune` stores
            the parameter as `weight_orig`.
        parameter: The parameter itself.
        owners: Every module that holds the parameter, with the name of the attribute there. A tied
            weight has several owners; some may be of types that are not prunable themselves.
        component: `"shared"`, a task, several tasks as in `"depth+normal"`, a name from `groups=`,
            `"unused"` or `"frozen"`.
        positions: The number of multiply-adds that each of its weights takes part in, in one
            forward pass of one example: the positions of a convolution's output map (of its input
            map if it is transposed), the tokens of a linear layer, summed over all uses. It is an
            average if the tensor's weights are not all used alike, and None if it is not known.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]
    component: str
    positions: float | None = None


@dataclass(frozen=True, eq=False)
class Components:
    """The prunable tensors of a multi-task model by the tasks that depend on them.

    `components[name]` returns the tensors of a component, `name in components` tells whether it has
    any, and `str(components)` is a small table, which notebooks show as HTML with all tensors.

    Attributes:
        tasks: The tasks in declared order.
        tensors: All prunable tensors in the order of `model.parameters()`, each once.
    """

    tasks: tuple[str, ...]
    tensors: tuple[PrunableTensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The components that are pruned: those with a tensor, without `"unused"` and `"frozen"`.

        Shared comes first, then single tasks, several tasks and other names from `groups=`.
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
        selected = tuple(tensor for tensor in self.tensors if tensor.component == component)
        if not selected and component not in (SHARED, UNUSED, FROZEN, *self.tasks):
            raise KeyError(f"no component {component!r}; there are {', '.join(self.names)}")
        return selected

    def __contains__(self, component: object) -> bool:
        return any(tensor.component == component for tensor in self.tensors)

    def __str__(self) -> str:
        return "\n".join(text_table(self._table(), left=1))

    def _repr_html_(self) -> str:
        rows = [["tensor", "component", "shape", "weights"]]
        for tensor in self.tensors:
            shape = " x ".join(map(str, tensor.parameter.shape))
            rows.append([tensor.name, tensor.component, shape, f"{tensor.parameter.numel():,}"])
        tensors = details(f"{len(self.tensors)} tensors", html_table(rows, left=3))
        return f"<div>{html_table(self._table(), left=1)}{tensors}</div>"

    def _table(self) -> list[list[str]]:
        pruned = sum(t.parameter.numel() for name in self.names for t in self[name])
        rows = [["component", "tensors", "weights", "share"]]
        for name in (*self.names, *(n for n in (UNUSED, FROZEN) if n in self)):
            weights = sum(tensor.parameter.numel() for tensor in self[name])
            share = f"{100 * weights / pruned:.1f} %" if name in self.names and pruned else "dense"
            rows.append([name, f"{len(self[name])}", f"{weights:,}", share])
        return rows


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
    """Sort the prunable tensors of `model` into components: shared, one per task, and others.

    AdapMTL ([arXiv 2408.03913](https://arxiv.org/abs/2408.03913)) prunes a shared backbone and one
    head per task. Here a component is the set of tensors that the same tasks depend on, whatever
    the architecture. A tensor that all tasks depend on is `"shared"`; one that a single task
    depends on belongs to that task; one that several depend on is partly shared, as in
    `"depth+normal"`. A tensor that no task depends on is `"unused"`. One that is not trained is
    `"frozen"`: it does not require grad, or the model cuts it off with `detach`, `no_grad` or
    `inference_mode`. Unused and frozen tensors stay dense.

    The model runs on the example inputs in train mode, and the autograd graph is followed from each
    task's output to the parameters. If no task depends on some tensors, the model runs again: in
    eval mode, because training can drop layers at random, and with `detach` and `no_grad` ignored,
    to tell frozen tensors from unused ones. This takes the time and the memory of one to three
    forward passes. Afterwards the model is as it was, but hooks on it have run.

    The run also shows whether the operations of the model receive the zeros of its weights. A layer
    that computes another weight in `forward`, with no zeros where the weight has them (as weight
    standardisation does), or that writes to its weight is an error: leave it out with `exclude`.

    It also counts the multiply-adds that the weights of each tensor take part in, for
    `apply_adapmtl(count="macs")` and reports.

    The graph is one of whole tensors, for these inputs. Where outputs are joined and sliced again,
    the joint part is shared. Where the input decides which parts run, only those that these inputs
    reach are found.

    Args:
        model: The multi-task model. `torch.compile`, DistributedDataParallel and DataParallel
            around it are ignored. Unless `task_outputs` or `task_inputs` says otherwise, its output
            has one entry per task: a mapping, named tuple or dataclass, whose keys or fields are
            the tasks, or a tuple or list, whose tasks are `"0"`, `"1"`, and so on. An entry may be
            nested. Entries without tensors are ignored, and so is a scalar called `"loss"` beside
            other entries. Task names must not be empty, contain `"+"` or `"."`, or be `"shared"`,
            `"unused"` or `"frozen"`.
        example_inputs: What the training loop gives the model: a tensor, a tuple of positional
            arguments or a dict of keyword arguments, on the model's device. One or two samples are
            enough. By default two images are made for the timm or segmentation-models-pytorch
            encoder in the model. Not needed if `groups` covers all prunable tensors.
        task_inputs: For a model that is called once for each task, as in `model(x, task)`: the
            example inputs of each task's call, by task. All that a call returns belongs to its
            task. It replaces `example_inputs` and `task_outputs`.
        task_outputs: How the output splits into tasks. Either a sequence of task names: names for
            the entries of a tuple or list, in order, or the keys or fields that are tasks. Or a
            mapping from task name to what selects the task's part of the output: a callable, a key,
            an attribute or an index.
        groups: Components chosen by hand for some tensors or all, instead of by the graph: from
            component name to selectors. A selector is the name of a module or parameter, a glob
            such as `"heads.*"`, a module or a parameter; a module stands for all prunable tensors
            in it. A component is `"shared"`, a task, several tasks joined by `"+"` (all tasks
            joined are `"shared"`) or another name that a task could have. Tensors that are frozen
            or unused are pruned if a group selects them. If `groups` covers all prunable tensors,
            the tasks are those of `task_outputs` or `task_inputs`, or else the names in `groups`.
            The model then runs only if there are example inputs, or an encoder to make them for, to
            see how it uses its weights.
        prunable: Which tensors are prunable, by module type: tensor names or globs, such as
            `{nn.LSTM: "weight_*"}`. They are added to the default; the most specific type of a
            module counts, and `()` makes nothing in it prunable. By default these are `weight` of
            `Linear`, of convolutions and of transposed convolutions, with their subclasses, and the
            input projections of `MultiheadAttention`. A tensor under `torch.nn.utils.prune` goes by
            its usual name (`weight`). So does one under `torch.nn.utils.parametrize`, if it is made
            from one parameter of the same shape: that parameter is then pruned. A tensor made from
            several parameters, as by weight normalisation, is not prunable.
        exclude: A selector, or several, of tensors that are not prunable: names, globs, modules or
            parameters, as in `groups`.

    Returns:
        The components. They hold floating-point parameters only, tied ones once.

    Raises:
        ValueError: If the model is lazy or sharded, has nothing to prune, is not multi-task or has
            an output without gradient; if a weight to prune is on the meta device, sparse,
            quantised or made in inference mode; if an operation does not receive the zeros of a
            weight to prune, or the model writes to it in `forward`; if no example inputs are given
            and none can be made; if a selector matches nothing, or two groups match the same
            tensor; if a task name is invalid.
        TypeError: If an argument is of the wrong type, or the model is scripted.
        RuntimeError: If the model fails on the example inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_adapmtl import find_components
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(4, 8)
        ...         self.heads = nn.ModuleDict(
        ...             {"left": nn.Linear(8, 1), "right": nn.Linear(8, 3)}
        ...         )
        ...
        ...     def forward(self, x):
        ...         return {
        ...             task: head(self.body(x)) for task, head in self.heads.items()
        ...         }
        >>> print(find_components(Net(), torch.randn(2, 4)))
        component  tensors  weights   share
        shared           1       32  50.0 %
        left             1        8  12.5 %
        right            1       24  37.5 %
    """
    model = unwrap(model)
    declared_tasks = _declared_tasks(task_inputs, example_inputs, task_outputs)
    groups = checked_groups(groups)
    inventory = Inventory(model, prunable, exclude)
    assigned = inventory.assign(groups)
    unassigned = inventory.prunable.keys() - assigned.keys()
    weights = [owned.parameter for owned in inventory.prunable.values()]
    component_of: dict[int, str] = {}
    if not unassigned:
        tasks = declared_tasks or tasks_of(groups)
        use = observe_use(model, example_inputs, task_inputs, weights)
    else:
        if task_inputs is None:
            detection = detect(model, example_inputs, task_outputs, unassigned, weights)
        else:
            detection = detect_each(model, task_inputs, unassigned, weights)
        tasks, use = detection.tasks, detection.use
        for key in unassigned:
            mask = detection.masks.get(key, 0)
            if not mask:
                component_of[key] = FROZEN if key in detection.cut_off else UNUSED
            elif not inventory.prunable[key].parameter.requires_grad:
                component_of[key] = FROZEN
            else:
                component_of[key] = component_of_tasks(tasks, mask)
    for key, group in assigned.items():
        component_of[key] = component_of_group(tasks, group)
    components = Components(
        tasks,
        tuple(
            PrunableTensor(
                owned.names[0],
                owned.parameter,
                tuple(owned.owners),
                component_of[key],
                None if math.isnan(use.positions.get(key, math.nan)) else use.positions[key],
            )
            for key, owned in inventory.prunable.items()
        ),
    )
    if not components.names:
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: of its prunable tensors "
            f"{len(components[FROZEN])} are frozen and {len(components[UNUSED])} unused; let some "
            "require grad, or name what to prune with groups="
        )
    unpruned = {key for key, component in component_of.items() if component in (UNUSED, FROZEN)}
    check_use(
        {k: o for k, o in inventory.prunable.items() if k not in unpruned - use.replaced}, use
    )
    return components


def _declared_tasks(
    task_inputs: Mapping[str, Any] | None, example_inputs: Any, task_outputs: TaskOutputs | None
) -> tuple[str, ...]:
    """Return the tasks that the arguments name, without running the model."""
    if task_inputs is None:
        return named_tasks(task_outputs)
    for name, value in (("example_inputs", example_inputs), ("task_outputs", task_outputs)):
        if value is not None:
            raise ValueError(
                f"task_inputs says how the model is called for each task, and {name} how it is "
                f"called for all: pass one of the two"
            )
    inputs: object = task_inputs
    if not isinstance(inputs, Mapping) or not inputs:
        raise TypeError(
            f"task_inputs must map each task to the example inputs of its call, found "
            f"{task_inputs!r}"
        )
    return tuple(check_task_name(name, "task_inputs") for name in task_inputs)
