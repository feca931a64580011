"""Running a model once to see which parameters each output depends on, without leaving a trace."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adapmtl.components._leaks import forget
from torch_adapmtl.components._outputs import OutputError
from torch_adapmtl.components._snapshot import untouched

__all__ = ["probe"]

_T = TypeVar("_T")


def probe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Callable[[Any], _T],
    *,
    training: bool = True,
    see_through: bool = False,
) -> _T:
    """Runs `model` and returns `read(its output)`; the model is afterwards as it was.

    The model runs in train mode (eval hides auxiliary heads), its batch normalisation in eval mode
    (the graph is the same, statistics stay, and a batch of one will do), first on fake tensors,
    which build the same graph without computing, then on real ones if that fails. Every
    floating-point parameter requires grad meanwhile, so that frozen parts show too.

    Args:
        model: The model, unwrapped.
        args: Positional arguments; tensors among them are copied before use.
        kwargs: Keyword arguments, likewise.
        read: Takes what it needs from the output while the graph is alive; no tensors.
        training: Whether in train mode.
        see_through: Ignore `detach`, `no_grad` and `inference_mode` in the model, to tell what
            they cut off from what is not used at all. It can break or change a model, so it is
            never the first look.

    Raises:
        OutputError: From `read`, as it is.
        Exception: Whatever the model raised on real tensors.
    """

    def run(tensors: AbstractContextManager[object]) -> _T:
        with untouched(model) as guard, _surroundings(see_through):
            _prepare(model, training)
            # Copies, as a model may normalise its input in place. Outside inference mode they
            # are ordinary tensors, whatever the caller's were.
            own_args, own_kwargs = _copied(args), _copied(dict(kwargs))
            with tensors, guard:
                return read(model(*own_args, **own_kwargs))

    made: list[weakref.ref[Tensor]] = []
    refused: OutputError | None = None
    try:
        found = [run(_fake_tensors(made))]
    except OutputError as error:
        found, refused = [], error.with_traceback(None)  # a traceback would keep the tensors
        if error.__cause__ is not None:  # a function of the user's, which may want real ones
            refused = None
    except Exception:
        found = []
    forget(made)
    if refused is not None:
        raise refused
    return found[0] if found else run(nullcontext())


def _prepare(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training and not isinstance(module, _BatchNorm)
        if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
            module._compiled_call_impl = None
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_inference():
            parameter.requires_grad_(True)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        items = [_copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is list:
        return [_copied(item) for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


@contextmanager
def _fake_tensors(made: list[weakref.ref[Tensor]]) -> Iterator[None]:
    """Lets operations run on tensors without data; notes those that come out of them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # It logs as errors what only means that real tensors have to be tried.
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        shortcuts = _Shortcuts(made)
        with FakeTensorMode(allow_non_fake_inputs=True), shortcuts:
            yield
    finally:
        logger.disabled = disabled


class _Shortcuts(TorchDispatchMode):
    """The shapes of frequent operations, which fake tensors take half a probe to work out."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = made

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = self._run(func, args, kwargs)
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._made.append(weakref.ref(item))
        return result

    @staticmethod
    def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and not args[5]:  # not training
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        if func is torch.ops.aten.native_layer_norm.default:
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        if func is torch.ops.aten.addmm.default and not kwargs:
            bias, left, right = args
            if left.shape[1] == right.shape[0] and bias.shape == right.shape[1:]:
                return left.new_empty(left.shape[0], right.shape[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def _surroundings(see_through: bool) -> Iterator[None]:
    """The state of torch that a probe needs, whatever the caller's is."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the model's own warnings come when it is trained
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(_checkpoints_kept_open())
        # Where nothing is compiled, dynamo is not loaded, and loading it takes a second.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if see_through:
            stack.enter_context(_inference_mode_ignored())
            stack.enter_context(_SeeThrough())
        yield


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Keeps half-precision copies of weights out of the cache of the caller's autocast.

    A copy made on fake tensors would be found by the next real forward, and one that the caller
    made under `no_grad` would hide its parameter from the probe.
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
def _checkpoints_kept_open() -> Iterator[None]:
    """Lets reentrant checkpointing run its function with grad; it hides the parameters inside."""

    def apply(function: Callable[..., _T], preserve_rng_state: bool, *args: Any) -> _T:
        return function(*args)

    with _replaced(torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(apply)):
        yield


@contextmanager
def _inference_mode_ignored() -> Iterator[None]:
    def enter(self: Any) -> None:
        return None

    def leave(self: Any, *exception: object) -> None:
        return None

    kind = torch.inference_mode
    with _replaced(kind, "__enter__", enter), _replaced(kind, "__exit__", leave):
        yield


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of a class for a while; an inherited one is inherited again afterwards."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class _SeeThrough(TorchFunctionMode):
    """Makes `detach`, `.data` and the switching off of grad mode do nothing."""

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
        # A method-wrapper is made anew at each access and compares by what it wraps.
        if func in (Tensor.detach, torch.detach) or func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].view_as(args[0])
        return func(*args, **(kwargs or {}))
