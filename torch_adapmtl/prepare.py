"""`apply_adapmtl`: find the components of a model, attach the thresholds, make the pruner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice, check_flag, check_fraction, check_steps
from torch_adapmtl.allocation._base import Allocator
from torch_adapmtl.budget.count import Count, check_budget_count, positions_of
from torch_adapmtl.components._inventory import Groups, Inventory, Selectors
from torch_adapmtl.components._outputs import TaskOutputs
from torch_adapmtl.components._prunable import Prunable
from torch_adapmtl.components._unwrap import unwrap
from torch_adapmtl.components.find import (
    FROZEN,
    UNUSED,
    Components,
    PrunableTensor,
    find_components,
)
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer, zeros_to_keep
from torch_adapmtl.layers.sparse_weights import pruned_parameter
from torch_adapmtl.methods._base import Controller, Method, as_json
from torch_adapmtl.methods.adaptive import Adaptive
from torch_adapmtl.methods.paper import Paper
from torch_adapmtl.pruner import Pruner
from torch_adapmtl.run._graph_module import is_graph, keep_pruner
from torch_adapmtl.run.checkpoint import guard
from torch_adapmtl.tensor.torch_prune import find_threshold
from torch_adapmtl.weighting._base import LossWeighting
from torch_adapmtl.weighting._make import make_weighting

__all__ = ["apply_adapmtl"]


# Inference mode is left, because tensors made in it could not be trained.
@torch.inference_mode(False)
def apply_adapmtl(
    model: nn.Module,
    *,
    target_sparsity: float,
    total_steps: int,
    count: Count = "weights",
    method: Literal["adaptive", "paper"] | Method = "adaptive",
    weighting: str
    | Mapping[str, float]
    | Callable[[dict[str, Tensor]], Mapping[str, Tensor | float]]
    | LossWeighting
    | None = None,
    groups: Groups | None = None,
    example_inputs: Any = None,
    task_inputs: Mapping[str, Any] | None = None,
    task_outputs: TaskOutputs | None = None,
    prunable: Prunable | None = None,
    exclude: Selectors = (),
    keep_zeros: bool = True,
    synchronize: bool = True,
) -> Pruner:
    """Prepare a multi-task model for training to a given sparsity with AdapMTL (arXiv 2408.03913).

    The function finds which weights are shared by all tasks and which belong to some of them,
    attaches a soft threshold to each prunable tensor, and returns the pruner, which weights the
    losses and moves the sparsity. The model is changed in place and used as before. Its parameters
    keep their identity, so an optimiser made before the call still works. Such an optimiser does
    not train thresholds. For the methods that train them (`Adaptive(allocation="gradient")`,
    `Paper()`, `STR()`), make the optimiser from
    [`Pruner.param_groups`][torch_adapmtl.Pruner.param_groups].

    Args:
        model: Any module with several outputs, one for each task. The wrappers of `torch.compile`
            and `DistributedDataParallel` are accepted: the module inside is prepared. For a method
            that trains thresholds, call this function before wrapping the model.
        target_sparsity: Zeros among all prunable weights at the end, as a fraction in [0, 1); with
            `count="macs"`, the share of their multiply-adds that the zeros save.
        total_steps: How often `step` will be called: the number of optimiser steps of the run.
        count: What `target_sparsity` counts. `"weights"`: every weight is one. `"macs"`: every
            weight counts as many multiply-adds as it takes part in for one example, its
            *positions*, which the run on the example inputs shows. The multiply-adds of the zeros
            at the end differ from the target by less than the largest number of positions. A
            mapping gives the positions of some tensors itself, by selectors as in `groups`; of
            several that match a tensor, the last counts. See
            [Multiply-adds](../concepts/budget.md#multiply-adds).
        method: The way of pruning. `"adaptive"`, the default, is
            [`Adaptive()`][torch_adapmtl.Adaptive]: an exact budget over the paper's thresholds.
            `"paper"` is [`Paper()`][torch_adapmtl.Paper], the mechanism as published. Any other
            [`Method`][torch_adapmtl.Method] can be passed: one of these with other settings, a
            baseline such as [`Magnitude()`][torch_adapmtl.Magnitude], or a class that you write.
        weighting: How the task losses are weighted: `"stability"` (the paper's text: a stable loss
            gets more weight), `"deviation"` (the authors' code: a fluctuating loss gets more),
            `"equal"`, a mapping from task to a fixed weight, a callable from losses to weights, or
            a [`LossWeighting`][torch_adapmtl.LossWeighting]. If None, it is `"stability"` with
            [`Paper()`][torch_adapmtl.Paper], else `"equal"`.
        groups: The components, where you choose them yourself. This and the next five arguments
            are passed to [`find_components`][torch_adapmtl.find_components], which documents them.
        example_inputs: The inputs of one call of the model. Not needed for models with a timm or
            segmentation-models-pytorch encoder, nor if `groups` covers every weight.
        task_inputs: The inputs by task, for a model that is called once for each task.
        task_outputs: How the model's output splits into tasks.
        prunable: Which tensors are prunable, by module type.
        exclude: Tensors that stay dense and are not counted.
        keep_zeros: Whether weights that are zero now stay zero. They count as zeros, and the
            schedule starts from them: a model that is 60 % sparse starts at 60 %. A tensor of zeros
            only is taken for one that has not been trained yet; none of its zeros is fixed.
        synchronize: Whether processes that train together (`torch.distributed` is initialised)
            average their losses for the weighting, and agree on which weights are pruned. Pass
            False if each process trains a different model.

    Returns:
        The pruner. It is also `model.adapmtl`, until `finalize` removes it.

    Raises:
        ValueError: If an argument is out of range or contradicts another, if the tasks cannot be
            distinguished, or if the model cannot be pruned as it is (see `find_components`).
        TypeError: If an argument is of the wrong kind.
        RuntimeError: If the model has a pruner already, or fails on the example inputs. After any
            of these errors the model is unchanged.

    Warns:
        UserWarning: If most weights are not prunable and stay dense, unless `exclude` is given; if
            most prunable weights are frozen (`requires_grad=False`) and stay dense. Later, in the
            step of an optimiser, if it trains prunable weights that no gradient reached here.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_adapmtl import apply_adapmtl
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(8, 16)
        ...         self.a = nn.Linear(16, 2)
        ...         self.b = nn.Linear(16, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.body(x).relu()
        ...         return {"a": self.a(h), "b": self.b(h)}
        >>> pruner = apply_adapmtl(
        ...     Net(),
        ...     target_sparsity=0.9,
        ...     total_steps=100,
        ...     example_inputs=torch.randn(2, 8),
        ... )
        >>> pruner.components.names
        ('shared', 'a', 'b')
    """
    target_sparsity = check_fraction("target_sparsity", target_sparsity)
    total_steps = check_steps(total_steps)
    counted = check_budget_count(count)
    check_flag("keep_zeros", keep_zeros)
    check_flag("synchronize", synchronize)
    method = _check_method(method)
    inner = unwrap(model)
    _check_plain(inner)
    components = find_components(
        inner,
        example_inputs,
        task_inputs=task_inputs,
        task_outputs=task_outputs,
        groups=groups,
        prunable=prunable,
        exclude=exclude,
    )
    pruned = _pruned_tensors(components)
    inventory = Inventory(inner, prunable, exclude) if isinstance(count, Mapping) else None
    positions = positions_of(count, pruned, inventory, synchronize=synchronize)
    layers = Layers(
        (
            Layer(
                tensor.name,
                tensor.component,
                tensor.owners,
                zeros_to_keep(*tensor.owners[0], keep_zeros=keep_zeros),
                positions=number,
            )
            for tensor, number in zip(pruned, positions, strict=True)
        ),
        counted,
    )
    layers.check_ties()
    if weighting is None:
        weighting = "stability" if isinstance(method, Paper) else "equal"
    losses = make_weighting(weighting, components.tasks, total_steps)
    config: dict[str, Any] = {
        "method": as_json(method.config(), "method"),
        "weighting": as_json(losses.config(), "weighting"),
        "tasks": list(losses.tasks),
        "count": {"of": counted},
    }
    if counted == "macs":
        config["count"]["positions"] = dict(zip(layers.names, layers.costs, strict=True))
    controller = method.controller(
        layers, inner, target_sparsity=target_sparsity, total_steps=total_steps
    )
    if not isinstance(controller, Controller):
        raise TypeError(
            f"method: {type(method).__name__}.controller() must return a Controller, got "
            f"{controller!r}"
        )
    prunable_ids = {id(tensor.parameter) for tensor in components.tensors}
    unprunable = {
        name: parameter.numel()
        for name, parameter in inner.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in prunable_ids
    }
    pruner = Pruner(
        inner,
        components,
        layers,
        controller,
        losses.to(layers.device),
        unprunable=unprunable,
        config=config,
    )
    for module in (*losses.modules(), *controller.modules()):
        if isinstance(module, LossWeighting | Controller | Allocator):
            module.synchronize &= synchronize  # a weighting may have been passed with False
    if not exclude:  # before the model changes, because filters may turn the warning into an error
        _warn_of_unprunable(unprunable, layers.total)
    _warn_of_frozen(components, layers.total)
    layers.attach()
    # Not `add_module`, which the model's class may override and a registration hook may refuse.
    inner._modules["adapmtl"] = pruner
    guard(inner, layers)
    if is_graph(inner):
        keep_pruner(inner)
    pruner._begin()
    return pruner


def _check_method(method: object) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(
            f"method must be an instance, got the class {method.__name__}: pass "
            f"{method.__name__}(...)"
        )
    check_choice("method", method, ("adaptive", "paper"), "a Method")
    return Adaptive() if method == "adaptive" else Paper()


def _check_plain(model: nn.Module) -> None:
    """Raise an error if the model is being pruned already."""
    if isinstance(model._modules.get("adapmtl"), Pruner):
        raise RuntimeError(
            "apply_adapmtl was called on this model before: use its pruner, model.adapmtl; or "
            "first call finalize() on it at the end of its run, or undo() to remove it without "
            "pruning"
        )
    if hasattr(model, "adapmtl"):
        raise ValueError("the model has an attribute 'adapmtl', the name of the pruner: rename it")
    if (name := pruned_parameter(model)) is not None:
        raise ValueError(
            f"{name!r} belongs to a model that is being pruned, or whose zeros are kept: first "
            f"call finalize() or undo() on its pruner, or release_zeros(model)"
        )
    if (name := find_threshold(model)) is not None:
        raise ValueError(
            f"{name!r} has a soft threshold already: remove it by torch.nn.utils.prune.remove, or "
            f"call finalize() on the pruner that put it there"
        )


def _pruned_tensors(components: Components) -> list[PrunableTensor]:
    pruned = [t for t in components.tensors if t.component not in (UNUSED, FROZEN)]
    if not pruned:
        raise ValueError(
            "the model has no prunable weights that are trained and reach an output: "
            + ", ".join(f"{t.name} is {t.component}" for t in components.tensors[:5])
        )
    return pruned


def _warn_of_frozen(components: Components, prunable: int) -> None:
    frozen = [t for t in components[FROZEN] if not t.parameter.requires_grad]
    weights = sum(tensor.parameter.numel() for tensor in frozen)
    if weights > prunable:
        warnings.warn(
            f"most of the prunable weights are frozen and stay dense: {weights} of "
            f"{weights + prunable}, in {len(frozen)} tensors such as {frozen[0].name!r}. The "
            f"target is met among the {prunable} others. If they are to be trained later, "
            f"name them in groups=, as in groups={{'shared': ['encoder']}}, which prunes them "
            f"too; to leave them dense without this warning, pass them as exclude=",
            stacklevel=4,  # the caller of apply_adapmtl; its decorator is one of the levels
        )


def _warn_of_unprunable(sizes: Mapping[str, int], prunable: int) -> None:
    unprunable = sum(sizes.values())
    if unprunable > prunable:
        largest = max(sizes, key=sizes.__getitem__)
        warnings.warn(
            f"most of the model's weights are not prunable and stay dense: {unprunable} of "
            f"{unprunable + prunable}, {largest!r} the largest tensor. The target is met among the "
            f"{prunable} others. To prune more, name types, as in "
            f"prunable={{nn.LSTM: 'weight_*'}}; to leave them dense without this warning, pass "
            f"them as exclude=",
            stacklevel=4,  # the caller of apply_adapmtl; its decorator is one of the levels
        )
