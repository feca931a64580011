"""Hooks on all optimisers: what happens before and after each of their steps."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from torch_adapmtl.layers.collection import Layers

__all__ = [
    "Follower",
    "follow",
    "followers",
    "kept_parameters",
    "running_steps",
    "unfollow",
    "watch_zeros",
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
# The names of weights that `finalize` has made sparse, and that no optimiser has trained since.
_finalized = WeakIdKeyDictionary()


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
    if _finalized:
        _warn_of_lost_zeros(parameters)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    stepping = [
        follower
        for follower in followers()
        if follower.begin_step(optimizer, parameters, closure=callable(closure))
    ]
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


def watch_zeros(layers: Layers) -> None:
    """Warn, once, if an optimiser trains these weights, so that their zeros get lost."""
    for layer in layers:
        if layer.threshold.earlier_mask is None:  # else torch.nn.utils.prune holds zeros
            _finalized[layer.weight] = layer.name


def _warn_of_lost_zeros(parameters: Mapping[int, Tensor]) -> None:
    kept = kept_parameters()
    trained = [
        (weight, name)
        for weight, name in list(_finalized.items())
        if id(weight) in parameters and weight.grad is not None
    ]
    for weight, _ in trained:
        del _finalized[weight]
    lost = [name for weight, name in trained if id(weight) not in kept]
    if lost:
        warnings.warn(
            f"an optimizer trains {lost[0]!r} after finalize(): its zeros, and those of "
            f"{len(lost) - 1} other tensors, do not stay zero. To finetune with zeros, train "
            f"before finalize(), or call keep_zeros(model) first",
            stacklevel=4,  # the caller of optimizer.step()
        )
