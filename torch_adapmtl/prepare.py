"""The one call that users make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice, check_fraction, check_reach, check_steps
from torch_adapmtl.methods._base import Controller, Mode
from torch_adapmtl.run._guard import guard
from torch_adapmtl.layers.layer import Layer, attach_all, check_ties
from torch_adapmtl.methods.adaptive import AdaptiveBudget, Allocation, GradientAllocation
from torch_adapmtl.budget.solver import SparsitySchedule
from torch_adapmtl.components.find import FROZEN, UNUSED, find_components, unwrap
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.methods.paper import PaperMode
from torch_adapmtl.pruner import AdapMTL
from torch_adapmtl.tensor.torch_prune import find_threshold
from torch_adapmtl.allocation.sensitivity import Sensitivity, SensitivityAllocation
from torch_adapmtl.tensor.soft_threshold import SoftThreshold
from torch_adapmtl.weighting.simple import LossWeighting, make_weighting

__all__ = ["apply_adapmtl"]

_DEFAULTS: Mapping[str, Any] = {
    "schedule": SparsitySchedule(),
    "granularity": "layer",
    "allocation": LAMPAllocation(),
    "reach": 1.1,
}


# Where the caller is in inference mode, what is made here is for training all the same.
@torch.inference_mode(False)
def apply_adapmtl(
    model: nn.Module,
    *,
    target_sparsity: float,
    total_steps: int,
    example_inputs: Any = None,
    task_inputs: Mapping[str, Any] | None = None,
    groups: Mapping[str, Any] | None = None,
    task_outputs: Any = None,
    prunable: Mapping[type[nn.Module], str | Sequence[str]] | None = None,
    exclude: Iterable[Any] = (),
    mode: Literal["adaptive", "paper"] | Mode = "adaptive",
    granularity: Literal["layer", "component"] | None = None,
    allocation: Literal["lamp", "sensitivity", "gradient", "common"] | Allocation | None = None,
    gradient: Literal["straight_through", "mask"] | None = None,
    reach: float | None = None,
    schedule: SparsitySchedule | None = None,
    min_density: float | Mapping[str, float] | None = None,
    max_density: float | Mapping[str, float] | None = None,
    keep_zeros: bool = True,
    weighting: str
    | Mapping[str, float]
    | Callable[[dict[str, Tensor]], Mapping[str, Tensor | float]]
    | LossWeighting = "stability",
    synchronize: bool = True,
) -> AdapMTL:
    """Prepare a multi-task model for training to a given sparsity with AdapMTL (arXiv 2408.03913).

    Finds which weights all tasks share and which belong to some, puts a soft threshold of its
    own on each, and returns the handle that weights the losses and moves the sparsity. The model
    is changed in place and used as before; its parameters keep their identity, so an optimiser
    made before the call goes on working. It does not train thresholds, though: where the gradient
    moves them (`allocation="gradient"`, `mode="paper"`), make the optimiser from `param_groups`.

    By default all thresholds follow one level that is solved so that the overall sparsity keeps to
    its schedule and ends at the target exactly, times an offset for each layer; see the
    concepts page. `mode="paper"` is the authors' mechanism instead.

    Args:
        model: Any module with several outputs, each a task. `torch.compile`'s and
            `DistributedDataParallel`'s wrappers are looked through; apply before wrapping where
            thresholds are trained (`allocation="gradient"`, `mode="paper"`).
        target_sparsity: Zeros among all prunable weights at the end, as a fraction in [0, 1).
        total_steps: How often `step` will be called: the number of optimiser steps of the run.
        example_inputs: What the model is called with to see its outputs: a tensor, a tuple of
            arguments or a dict of keyword arguments. Not needed for models over a timm or
            segmentation-models-pytorch encoder, nor when `groups` covers every weight.
        task_inputs: For a model that is called once for each task, as in `model(x, task)`: from
            task name to the example inputs of its call.
        groups: Components given by hand, in whole or in part: from component name to modules,
            parameters, names or globs. See [`find_components`][torch_adapmtl.find_components].
        task_outputs: How the model's output splits into tasks, where it is not a mapping or tuple.
        prunable: Which tensors are prunable besides, or in place of, the default ones. Where a
            tensor has parametrizations, what they are given is pruned and counted: leave out, by
            `exclude`, one whose parametrization makes something else of a zero.
        exclude: Modules, parameters, names or globs that stay dense and count in no figure.
        mode: `"adaptive"`, or `"paper"` or a `PaperMode` for the paper's own mechanism, or one of
            the [baselines][torch_adapmtl.baselines].
        granularity: One offset for each `"layer"` (the default), or each `"component"` as in the
            paper. Not in paper mode, like the next five but `gradient`.
        allocation: What moves the offsets: `"lamp"` (the default), what each layer's weights are
            worth to its output; `"sensitivity"`, what pruning costs the loss; `"gradient"`, the
            task gradient (the paper's way); or nothing (`"common"`: one threshold for all). Or an
            instance of [`LAMPAllocation`][torch_adapmtl.LAMPAllocation],
            [`SensitivityAllocation`][torch_adapmtl.SensitivityAllocation] or
            [`GradientAllocation`][torch_adapmtl.GradientAllocation].
        gradient: Whether pruned weights keep learning, until late in the run (the schedule's
            `regrow_until`; `"straight_through"`, the default), or not (`"mask"`, the paper's, and
            the default in paper mode).
        reach: Where the shrinkage of the remaining weights ends, in units of the threshold: 1.1 by
            default; `math.inf` for the paper's soft threshold. See
            [`soft_threshold`][torch_adapmtl.soft_threshold].
        schedule: How the sparsity rises; see [`SparsitySchedule`][torch_adapmtl.SparsitySchedule].
        min_density: Least share of nonzero weights of a component, as a fraction; one for all or a
            mapping by component. Every layer also keeps a floor: a tenth of the overall density,
            and more if it is small.
        max_density: Largest share of nonzero weights of a component, likewise.
        keep_zeros: Whether zeros that the weights have now stay zero. They count as zeros, and the
            schedule starts from them: a model that is 60 % sparse goes on from 60 %. A tensor that
            is zero throughout has yet to be trained, and is free.
        weighting: Of the task losses: `"stability"` (the paper's text: a stable loss weighs more),
            `"deviation"` (the authors' code: a deviating one does), `"equal"`, a mapping of fixed
            weights, a callable, or a `LossWeighting`.
        synchronize: Whether processes that train together (`torch.distributed` is initialised)
            average their losses for the weighting, and add up the saliencies that
            `allocation="sensitivity"` asks for. False if each process trains a model of its own.

    Returns:
        The handle. It is also `model.adapmtl`, until `finalize`.

    Raises:
        ValueError: If an argument is out of range or contradicts another, if the tasks cannot be
            told apart, or if the model cannot be pruned as it is (see `find_components`); the model
            is untouched then, as after the other errors.
        TypeError: If an argument is of the wrong kind.
        RuntimeError: If the model has a handle already, or fails on the example inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_adapmtl import apply_adapmtl
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.body(x).relu()
        ...         return {"a": self.a(h), "b": self.b(h)}
        >>> pruner = apply_adapmtl(
        ...     Net(), target_sparsity=0.9, total_steps=100, example_inputs=torch.randn(2, 8)
        ... )
        >>> pruner.components.names
        ('shared', 'a', 'b')
    """
    target_sparsity = check_fraction("target_sparsity", target_sparsity)
    total_steps = check_steps(total_steps)
    make_budget, chosen = _budget(
        mode, gradient,
        granularity=granularity, allocation=allocation, reach=reach, schedule=schedule,
        min_density=min_density, max_density=max_density,
    )  # fmt: skip
    inner = unwrap(model)
    if isinstance(inner._modules.get("adapmtl"), AdapMTL):
        raise RuntimeError(
            "apply_adapmtl was called on this model before: use its handle (model.adapmtl), or "
            "call finalize() on it first"
        )
    if hasattr(inner, "adapmtl"):
        raise ValueError("the model has an attribute 'adapmtl', where the handle goes: rename it")
    if (name := find_threshold(inner)) is not None:
        raise ValueError(
            f"{name!r} has a soft threshold already, or a mask of keep_zeros: call finalize() on "
            f"the handle that put it there, release_zeros(model), or torch.nn.utils.prune.remove"
        )

    components = find_components(
        inner,
        example_inputs,
        task_inputs=task_inputs,
        task_outputs=task_outputs,
        groups=groups,
        prunable=prunable,
        exclude=exclude,
    )
    unset = SoftThreshold()
    layers = [
        Layer(t.name, t.component, t.owners, unset, keep_zeros)
        for t in components.tensors
        if t.component not in (UNUSED, FROZEN)
    ]
    if not layers:
        raise ValueError(
            "the model has no prunable weights that are trained and reach an output: "
            + ", ".join(f"{t.name} is {t.component}" for t in components.tensors[:5])
        )
    check_ties(layers)
    losses = make_weighting(weighting, components.tasks, total_steps)
    budget = make_budget(layers, inner, target=target_sparsity, total_steps=total_steps)
    taken = {id(t.parameter) for t in components.tensors}
    others = [
        (name, p.numel())
        for name, p in inner.named_parameters()
        if p.ndim >= 2 and id(p) not in taken
    ]
    handle = AdapMTL(
        inner,
        components,
        others,
        layers,
        budget,
        losses.to(layers[0].weight.device),
        target_sparsity=target_sparsity,
        total_steps=total_steps,
        options={**chosen, "weighting": repr(losses)},
    )
    for module in handle.modules():
        if isinstance(module, LossWeighting | Controller | Sensitivity):
            module.synchronize &= synchronize  # a weighting may have been given with False
    if not exclude:  # before the model changes: a warning may be made an error
        _warn_of_others(others, sum(layer.weight.numel() for layer in layers))
    attach_all(layers)
    # Not `add_module`, which a model's own __setattr__ or an attribute hook might refuse.
    inner._modules["adapmtl"] = handle
    guard(inner)
    return handle


def _warn_of_others(others: Sequence[tuple[str, int]], prunable: int) -> None:
    left = sum(count for _, count in others)
    if left > prunable:
        largest = max(others, key=lambda other: other[1])[0]
        warnings.warn(
            f"most of the model's weights are not prunable and stay dense: {left} of "
            f"{left + prunable}, {largest!r} the largest tensor. The target is met among the "
            f"{prunable} others. To prune more, name types, as in "
            f"prunable={{nn.LSTM: 'weight_*'}}; to leave them dense without this warning, pass "
            f"them as exclude=",
            stacklevel=4,  # out of the decorator too
        )


def _budget(
    mode: object, gradient: object, **options: Any
) -> tuple[Callable[..., Controller], dict[str, str]]:
    """Check the options that need no model; return what makes the controller, and all of them."""
    if gradient is not None:
        check_choice("gradient", gradient, ("straight_through", "mask"))
    if mode == "paper":
        mode = PaperMode()
    if isinstance(mode, PaperMode):
        _check_unused(mode, **options)
        chosen = {"mode": repr(mode), "gradient": repr(gradient)}
        return partial(mode.controller, straight_through=gradient == "straight_through"), chosen
    if isinstance(mode, Mode):
        _check_unused(mode, gradient=gradient, **options)
        return mode.controller, {"mode": repr(mode)}
    check_choice("mode", mode, ("adaptive", "paper"))

    given = {name: value for name, value in options.items() if value is not None}
    given = {**_DEFAULTS, **given}
    _check_schedule(given["schedule"])
    check_choice("granularity", given["granularity"], ("layer", "component"))
    check_reach(given["reach"])
    given["allocation"] = _allocation(given["allocation"])
    given["straight_through"] = gradient != "mask"
    names = sorted({*options, *given})
    chosen = {"mode": repr(mode), **{name: repr(given.get(name)) for name in names}}
    return lambda layers, _, **run: AdaptiveBudget(layers, **run, **given), chosen


def in_full(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `apply_adapmtl` with the defaults of those that are not given, for the record.

    Only the default mode has any; the others hold all their numbers themselves.
    """
    if options.get("mode", "adaptive") != "adaptive":
        return dict(options)
    found = {"gradient": "straight_through", **_DEFAULTS, **options}
    return {**found, "allocation": _allocation(found["allocation"])}


def _allocation(value: object) -> Allocation | None:
    if isinstance(value, Allocation):
        return value
    kinds: dict[str, Callable[[], Allocation | None]] = {
        "lamp": LAMPAllocation,
        "sensitivity": SensitivityAllocation,
        "gradient": GradientAllocation,
        "common": lambda: None,
    }
    check_choice("allocation", value, tuple(kinds))
    return kinds[str(value)]()


def _check_schedule(value: object) -> None:
    if not isinstance(value, SparsitySchedule):
        raise TypeError(
            f"schedule must be a SparsitySchedule, such as SparsitySchedule(shape='linear'), got "
            f"{value!r}"
        )


def _check_unused(mode: Mode, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} has no effect in mode={mode!r}, which decides on it by itself: leave it "
                f"out, or use mode='adaptive'"
            )
