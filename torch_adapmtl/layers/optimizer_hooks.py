"""Hooks on all optimisers: what happens before and after each of their steps."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "Follower",
    "follow",
    "followers",
    "forget_momentum",
    "kept_parameters",
    "running_steps",
    "stop_warning",
    "unfollow",
    "warn_if_trained",
]


class Follower(Protocol):
    """An object that is told of the steps of all optimisers."""

    def kept(self) -> set[int]:
        """Return the `id` of each parameter that it keeps sparse."""

    def begin_step(
        self, optimizer: Optimizer, parameters: Collection[int], *, closure: bool
    ) -> bool:
        """Begin a step of the parameters with these ids; return whether it keeps any."""

    def end_step(self, optimizer: Optimizer) -> None:
        """End a step."""

    def paused_step(self) -> AbstractContextManager[None]:
        """Return a context for the closure that an optimiser calls in its step."""


_followers: weakref.WeakSet[Any] = weakref.WeakSet()
_registered: list[Any] = []
# Optimisers that have stepped parameters of a follower.
_steppers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
# Weights that no optimiser has trained since `warn_if_trained`: their names, and the warning.
_untrained = WeakIdKeyDictionary()


def follow(follower: Follower) -> None:
    """Tell an object of the steps of all optimisers from now on, as long as it exists."""
    _followers.add(follower)
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))
        _registered.append(register_optimizer_step_post_hook(_after_step))


def unfollow(follower: Follower) -> None:
    """Undo `follow`."""
    _followers.discard(follower)


def followers() -> list[Any]:
    """Return the objects that are told of the steps."""
    return list(_followers)


def kept_parameters() -> set[int]:
    """Return the `id` of each parameter that is kept sparse."""
    return set[int]().union(*(follower.kept() for follower in followers()))


@torch.no_grad()
def forget_momentum(parameters: Collection[int]) -> None:
    """Set the momentum to zero in every optimiser that has stepped one of these parameters.

    The momentum of all its parameters: the buffer of SGD and RMSprop, the first moment of Adam and
    its kin. Second moments and step counts stay. A compiled step is not noticed.

    Args:
        parameters: The `id` of each parameter.
    """
    for optimizer in list(_steppers):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(parameters):
            continue
        for state in optimizer.state.values():
            for name in ("momentum_buffer", "exp_avg"):
                if isinstance(state.get(name), Tensor):
                    state[name].zero_()


# The code of the function by which torch wraps the steps of optimisers.
_STEP = Optimizer.profile_hook_step(Optimizer.step).__code__


def running_steps(optimizer: Optimizer) -> int:
    """The number of running steps of an optimiser, one inside the other."""
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        count += frame.f_code is _STEP and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return count


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> Any:
    """Make the weights dense that the optimiser updates, and sparse in the optimiser's closure."""
    if torch.compiler.is_compiling():
        return None  # a compiled step cannot call this; `catch_up` does it later
    parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if _untrained:
        _warn_of_trained(parameters)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    stepping = [
        follower
        for follower in followers()
        if follower.begin_step(optimizer, parameters, closure=callable(closure))
    ]
    if stepping:
        _steppers.add(optimizer)
    if not stepping or not callable(closure):
        return None

    def paused(*arguments: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for follower in stepping:
                stack.enter_context(follower.paused_step())
            return closure(*arguments, **options)

    if "closure" in kwargs:
        return args, {**kwargs, "closure": paused}
    return (args[0], paused, *args[2:]), kwargs


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
    if not torch.compiler.is_compiling():
        for follower in followers():
            follower.end_step(optimizer)


def warn_if_trained(
    weights: Iterable[tuple[Tensor, str]], text: Callable[[list[str]], str]
) -> object:
    """Warn, once, when an optimiser trains weights that are not kept sparse.

    Args:
        weights: The weights, and their names.
        text: Makes the warning, from the names of those that are trained in the first such step.

    Returns:
        What `stop_warning` takes.
    """
    warning = partial(text)  # another object for each call
    for weight, name in weights:
        _untrained[weight] = name, warning
    return warning


def stop_warning(warning: object) -> None:
    """Undo `warn_if_trained`."""
    for weight, (_, other) in list(_untrained.items()):
        if other is warning:
            del _untrained[weight]


def _warn_of_trained(parameters: Mapping[int, Tensor]) -> None:
    trained = [
        (weight, *found)
        for weight, found in list(_untrained.items())
        if id(weight) in parameters and weight.grad is not None
    ]
    if not trained:
        return
    kept = kept_parameters()
    names: dict[Callable[[list[str]], str], list[str]] = {}
    for weight, name, warning in trained:
        del _untrained[weight]
        if id(weight) not in kept:
            names.setdefault(warning, []).append(name)
    for warning, found in names.items():
        stop_warning(warning)
        warnings.warn(warning(found), stacklevel=4)  # the caller of optimizer.step()
