"""What one pass of a model does, as a list of steps that can be repeated without its Python.

While a pass is recorded, torch shows each of its operations to a `Recording`, and the layers show
it the calls of their kernels. The memory that the pass takes comes from an arena, so that a step
that is repeated finds its inputs where it found them before.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

P = ParamSpec("P")
R = TypeVar("R")


class NotRepeatableError(Exception):
    """A pass does what a list of steps cannot repeat, such as to look at a value."""


class Arena:
    """Memory that stays: another tensor may get what one gave up, but nothing is freed.

    Args:
        most: Number of floats that it may hold.

    Attributes:
        size: Number of floats that it holds.
    """

    def __init__(self, most: int) -> None:
        self._most, self.size = most, 0
        self._blocks: list[Tensor] = []
        self._free: list[int] = []  # numbers of blocks
        self._leases: dict[int, Any] = {}

    def take(self, count: int) -> Tensor:
        """A tensor of so many floats, whose memory is free again when no view of it is left."""
        count = max(count, 1)
        fitting = [i for i in self._free if self._blocks[i].numel() >= count]
        if fitting:
            number = min(fitting, key=lambda i: self._blocks[i].numel())
            self._free.remove(number)
        else:
            number = len(self._blocks)
            self.count(count)
            self._blocks.append(torch.empty(count, dtype=torch.float32, device="cpu"))
        # The storage of the tensor keeps `memory`, which tells when it is gone.
        memory = (ctypes.c_float * count).from_address(self._blocks[number].data_ptr())
        self._leases[number] = weakref.ref(memory, lambda _: self._free.append(number))
        return torch.frombuffer(memory, dtype=torch.float32)

    def count(self, floats: int) -> None:
        """Count memory that a recording keeps.

        Raises:
            NotRepeatableError: If that is too much.
        """
        self.size += floats
        if self.size > self._most:
            raise NotRepeatableError(f"it takes more than {4 * self._most:,} bytes")

    def _find(self, x: Any) -> tuple[Tensor, int] | None:
        """The block that a tensor lies in, and the place of its first float."""
        if isinstance(x, Tensor) and is_plain(x):
            for block in self._blocks:
                offset = x.data_ptr() - block.data_ptr()
                if 0 <= offset < 4 * block.numel():
                    return block, offset // 4
        return None

    def holds(self, x: Any) -> bool:
        """Whether a tensor lies in the arena."""
        return self._find(x) is not None

    def unclaimed(self, x: Any) -> Any:
        """The same tensor without a claim on its memory, if it lies in the arena."""
        found = self._find(x)
        return x if found is None else found[0].as_strided(x.shape, x.stride(), found[1])


@dataclass(frozen=True)
class Step:
    """A part of a pass.

    Attributes:
        layer: The layer that does it; empty if none does.
        call: The fields of a call of the kernels, or an operation of torch.
    """

    layer: str
    call: ctypes.Array[ctypes.c_int64] | Callable[[], None]


class _State(threading.local):
    recording: Recording | None = None


STATE = _State()


class Recording(TorchDispatchMode):
    """Records what this thread does while it is entered.

    Args:
        most: Number of floats that the arena may hold.

    Attributes:
        steps: What is done, in order.
        arena: The memory.
        alive: What the steps point to.
    """

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.arena = Arena(most)
        self.alive: list[Any] = []
        self._layer, self._paused = "", False
        self._others: set[int] = set()  # where results lie that are of another type

    def __enter__(self) -> Recording:
        STATE.recording = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        STATE.recording = None

    def floats(self, shape: Sequence[int]) -> Tensor:
        """Memory for the kernels."""
        count = torch.Size(shape).numel()
        with self.pause():
            return self.arena.take(count)[:count].view(*shape)

    def add_call(self, call: ctypes.Array[ctypes.c_int64], alive: Any) -> None:
        """Note a call of the kernels, and what it points to."""
        self.steps.append(Step(self._layer, type(call).from_buffer_copy(call)))
        self.alive.append(tree_map(self.arena.unclaimed, alive))  # the arena is kept as a whole

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """What is done inside is done by a layer."""
        before, self._layer = self._layer, name
        yield
        self._layer = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not a part of the pass."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        self._check(func, args, kwargs)
        result = func(*args, **kwargs)
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = tree_leaves(result)
        if not all(isinstance(x, Tensor) and x.layout is torch.strided for x in made):
            raise NotRepeatableError(f"{func} returns what is no tensor")
        is_given = all(_memory(x) in given for x in made)
        if func._schema.is_mutable:
            if not is_given:
                raise NotRepeatableError(f"{func} both changes a tensor and makes one")
            self._add(func, args, kwargs, None)
            return result
        if is_given:
            return result  # views
        kept = tree_map(self._keep, result)
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self._add(func, args, kwargs, kept)
        return kept

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse what a step could not repeat, before it is done."""
        for x in tree_leaves((args, kwargs)):
            # What depends on other types, such as a mask, may have another shape next time; and
            # some operations read them where torch does not show it. Constants stay.
            is_other = isinstance(x, Tensor) and not is_plain(x)
            if is_other and (x.layout is not torch.strided or _memory(x) in self._others):
                raise NotRepeatableError(f"{func} takes what is no plain float32 tensor")
        # Indices are constants here: others were refused above.
        varies = _NOT_REPEATABLE & {*func.tags} and func is not torch.ops.aten.index.Tensor
        if varies or func is torch.ops.aten.lift_fresh.default:
            raise NotRepeatableError(f"{func} does not do the same each time")
        named = {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves({**named, **kwargs}.get(argument.name)):
                    if not self.arena.holds(x):
                        raise NotRepeatableError(f"{func} changes what was there before")

    def _keep(self, x: Tensor) -> Tensor:
        """The same in the arena; what no step can take is kept where it is."""
        if not is_plain(x) or not x.numel():
            self._others.add(_memory(x))
            self.alive.append(x)
            self.arena.count(x.nbytes // 4)
            return x
        return self.arena.take(extent(x)).as_strided(x.shape, x.stride()).copy_(x)

    def _add(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        args, kwargs, results = tree_map(self.arena.unclaimed, (args, kwargs, results))
        places = [x for x in tree_leaves(results) if x is not None]
        self.steps.append(Step(self._layer, _repeat(func, args, kwargs, places)))


def _repeat(func: Any, args: Any, kwargs: Any, places: list[Tensor]) -> Callable[[], Any]:
    """A function that does an operation again, with its results in the same places."""
    if not places:  # it works in place
        return functools.partial(func, *args, **kwargs)
    if func is torch.ops.aten.clone.default:
        return functools.partial(places[0].copy_, args[0])
    found = _writing(func)
    if found is not None:
        into, name = found
        return functools.partial(into, *args, **kwargs, **{name: places[0]})

    def repeat() -> None:
        for place, x in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
            place.copy_(x)

    return repeat


@functools.cache
def _writing(func: Any) -> tuple[Any, str] | None:
    """The overload of an operation that writes to a given tensor, and what it calls that."""
    given = [(x.name, str(x.type)) for x in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        own = overload._schema.arguments
        written = [x.name for x in own if x.is_out]
        if len(written) == 1 and given == [(x.name, str(x.type)) for x in own if not x.is_out]:
            return overload, written[0]
    return None


_NOT_REPEATABLE = {
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.inplace_view,
}


def is_plain(x: Tensor) -> bool:
    """Whether it is a float32 tensor on the CPU that is stored as it is."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and not x.is_neg()
    )


def extent(x: Tensor) -> int:
    """Floats from the first element of a tensor to the last one."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def unrecorded(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what prepares a pass, once for all passes: its operations are not repeated."""

    @functools.wraps(function)
    def prepare(*args: P.args, **kwargs: P.kwargs) -> R:
        if STATE.recording is None:
            return function(*args, **kwargs)
        with STATE.recording.pause():
            return function(*args, **kwargs)

    return prepare
