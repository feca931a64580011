"""Running a model once, to look at the autograd graph of its output, without changing the model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from torch_adapmtl.components._multiply_adds import batch_size
from torch_adapmtl.components._snapshot import untouched
from torch_adapmtl.components._weight_use import WeightUse, WeightUseMode

__all__ = ["probe"]

_T = TypeVar("_T")


def probe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Callable[[Any, WeightUse], _T],
    *,
    weights: Sequence[nn.Parameter] = (),
    training: bool = True,
    see_through: bool = False,
) -> _T:
    """Run `model` and return `read(output, use)`; afterwards the model is as it was.

    The model runs in train mode, because eval mode hides auxiliary heads. Batch normalisation runs
    in eval mode: the graph is the same, statistics do not change, and a batch of one is enough.
    Every floating-point parameter requires grad during the run, so that the graph shows frozen
    parameters too.

    Args:
        model: The model, unwrapped.
        args: Positional arguments of the model. Tensors in them are copied.
        kwargs: Keyword arguments of the model. Tensors in them are copied.
        read: Called with the model's output while its graph exists, and with how the model used
            `weights`. It must not return tensors.
        weights: The parameters to watch.
        training: Whether the model runs in train mode.
        see_through: Ignore `detach`, `no_grad` and `inference_mode` in the model. This tells
            parameters that they cut off from parameters that are not used at all. It can break a
            model, so use it only after a normal run.

    Raises:
        Exception: Whatever the model or `read` raises.
    """
    with untouched(model) as guard, _torch_state(see_through):
        _prepare(model, training)
        # The model may change its input in place. The copies are also ordinary tensors where the
        # caller's were made in inference mode.
        copied_args, copied_kwargs = _copy(args), _copy(dict(kwargs))
        watch = None
        if weights and guard is not None:
            watch = WeightUseMode(model, weights, batch_size(args, kwargs))
        with guard or nullcontext():
            with watch or nullcontext():
                output = model(*copied_args, **copied_kwargs)
            return read(output, watch.result() if watch else WeightUse())


def _prepare(model: nn.Module, training: bool) -> None:
    """Set the mode of all modules, and make all parameters require grad."""
    for module in model.modules():
        module.training = training and not isinstance(module, _BatchNorm)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_inference():
            parameter.requires_grad_(True)


def _copy(value: Any) -> Any:
    """Copy the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        items = [_copy(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is list:
        return [_copy(item) for item in value]
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return value


@contextmanager
def _torch_state(see_through: bool) -> Iterator[None]:
    """Set the state of torch that a probe needs, whatever the caller's is, and restore it."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the model warns again when the user trains it
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(_transparent_checkpoints())
        # Loading dynamo takes a second, and where it is not loaded nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if see_through:
            stack.enter_context(_no_inference_mode())
            stack.enter_context(_NoDetach())
        yield


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Empty autocast's cache of half-precision weights, before and after, and do not use it.

    A copy of a weight that the caller made under `no_grad` would hide the weight from the probe. A
    copy that the probe makes must not be used by the caller, who may freeze or change the weight.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()


@contextmanager
def _transparent_checkpoints() -> Iterator[None]:
    """Make reentrant checkpointing run its function with grad.

    Normally it runs it without, so that the graph does not show the parameters that it uses.
    """

    def apply(function: Callable[..., _T], preserve_rng_state: bool, *args: Any) -> _T:
        return function(*args)

    with _replaced(torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(apply)):
        yield


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Make `inference_mode` do nothing."""

    def do_nothing(self: Any, *exception: object) -> None:
        return None

    mode = torch.inference_mode
    with _replaced(mode, "__enter__", do_nothing), _replaced(mode, "__exit__", do_nothing):
        yield


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a class and restore it."""
    defined = vars(owner).get(name)  # None if the attribute is inherited
    setattr(owner, name, value)
    try:
        yield
    finally:
        if defined is None:
            delattr(owner, name)
        else:
            setattr(owner, name, defined)


class _NoDetach(TorchFunctionMode):
    """Makes `detach`, `.data` and changes of grad mode do nothing."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func in (Tensor.detach_, torch.detach_):
            return args[0]
        # `__get__` is another object at each access, but one that is equal.
        if func in (Tensor.detach, torch.detach) or func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].view_as(args[0])
        return func(*args, **(kwargs or {}))
