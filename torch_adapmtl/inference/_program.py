"""Passes of a model that are repeated without its Python.

The layers of a small net are faster than the Python between them. As a graph does the same for all
inputs of one form, its second pass is recorded, and the following ones repeat the steps.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._call import Fields, clock, engine
from ._copy_model import close
from ._record import Arena, NotRepeatableError, Recording, Step, extent, is_plain
from ._repeatable import is_repeatable, keeps_images_apart

MOST_PROGRAMS = 4  # forms of inputs that a model remembers
FEWEST_CALLS = 8  # for which a program is worth the recording
MOST_FLOATS = 2**24  # that a program may keep for itself, 64 MiB
MOST_IN_CACHE = 3 * 2**20  # that the activations of a part of a batch may take, 12 MiB

_MET, _NOT_REPEATABLE = "met", "not repeatable"


class Program:
    """A pass of a model with inputs of one form, or several passes with parts of a batch.

    Args:
        module: The model. It is called once.
        leaves: The inputs.
        spec: How they make the arguments; None if they are the positional arguments.
        part: Number of images in a part of the batch; None if the batch is not split.

    Attributes:
        lock: Only one thread may call the program.
        calls: How often it was called.
        size: Number of floats that its activations take.

    Raises:
        NotRepeatableError: If the model does more than operations on tensors.
    """

    def __init__(
        self, module: nn.Module, leaves: list[Any], spec: Any, part: int | None = None
    ) -> None:
        self.lock, self.calls = threading.Lock(), 0
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._part, self._batch = part, len(tensors[0]) if part else 0
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [_part(x, part).clone() if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = _arguments(self._inputs, spec)
            with Recording(MOST_FLOATS) as recording:
                outputs = _recorded(recording, module, args, kwargs)
        self._outputs, self._output_spec = tree_flatten(outputs)
        self._check_outputs(recording.arena)
        self._alive = recording.arena, recording.alive
        self.size = recording.arena.size
        self._steps = _joined(recording.steps)
        self._by_layer = [
            (layer, _joined(steps)) for layer, steps in groupby(recording.steps, lambda s: s.layer)
        ]

    def _check_outputs(self, arena: Arena) -> None:
        outputs = self._outputs
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        if not all(map(_is_simple, outputs)):
            raise NotRepeatableError("it returns an object that may hold tensors")
        if not all(arena.holds(x) and extent(x) == x.numel() for x in tensors):
            raise NotRepeatableError("it returns what it was given, or a part of a tensor")
        if len({x.untyped_storage().data_ptr() for x in tensors}) < len(tensors):
            raise NotRepeatableError("it returns tensors that share memory")
        is_batch = len(tensors) == len(outputs) and all(x.dim() for x in tensors)
        if self._part and not (is_batch and all(len(x) == self._part for x in tensors)):
            raise NotRepeatableError("it returns what is not a batch")

    def __call__(self, leaves: list[Any]) -> Any:
        """The outputs for other inputs of the same form."""
        self.calls += 1
        if self._part is None:
            self._copy_inputs(leaves)
            self._pass()
            results = [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]
            return tree_unflatten(results, self._output_spec)
        wholes = list(map(self._empty_whole, self._outputs))
        for i in range(0, self._batch, self._part):
            images = slice(i, i + self._part)
            self._copy_inputs([x[images] if isinstance(x, Tensor) else x for x in leaves])
            self._pass()
            for whole, x in zip(wholes, self._outputs, strict=True):
                whole[images] = x
        return tree_unflatten(wholes, self._output_spec)

    def _empty_whole(self, x: Tensor) -> Tensor:
        """A tensor for the whole batch whose dimensions lie in memory in the order of a part's."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return torch.empty_permuted((self._batch, *x.shape[1:]), order, dtype=x.dtype, device="cpu")

    def _copy_inputs(self, leaves: list[Any]) -> None:
        for own, x in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(x)

    def _pass(self) -> None:
        for step in self._steps:
            step()

    def seconds(self) -> dict[str, float]:
        """The time that each layer takes in a call."""
        parts = self._batch // self._part if self._part else 1
        result: dict[str, float] = {}
        for layer, steps in self._by_layer:
            begin = clock()
            for step in steps:
                step()
            result[layer] = result.get(layer, 0.0) + parts * (clock() - begin)
        return result


def record(module: nn.Module, leaves: list[Any], spec: Any) -> Program | None:
    """A program for a model and inputs; batches whose maps would not fit into caches are split.

    Returns:
        None if the model does more than operations on float32 tensors, or takes too much memory.
    """
    if not all(map(_is_simple_input, leaves)):
        return None
    for make in (_in_parts, Program):
        try:
            program = make(module, leaves, spec)
        except NotRepeatableError:
            continue
        if program is not None:
            return program
    return None


def _in_parts(module: nn.Module, leaves: list[Any], spec: Any) -> Program | None:
    """A program for parts of a batch; None if the batch is better computed as a whole."""
    batch = _batch_of(leaves)
    if batch < 2 or not keeps_images_apart(module):
        return None
    one = Program(module, leaves, spec, 1)
    most = max(MOST_IN_CACHE, one.size)
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and n * one.size <= most)
    if part == batch or part * one.size <= MOST_IN_CACHE / 4:
        return None
    program = one if part == 1 else Program(module, leaves, spec, part)
    args, kwargs = _arguments(leaves, spec)
    return program if close(program(leaves), module(*args, **kwargs)) else None


def _recorded(recording: Recording, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The outputs of a model while it is recorded.

    Raises:
        NotRepeatableError: Also for what the model's code raises where an operation is refused.
    """
    try:
        return module(*args, **kwargs)
    except NotRepeatableError:
        raise
    except Exception as error:
        raise NotRepeatableError(f"it raised {error!r} while it was recorded") from error


def flat(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """The leaves of arguments, and how they make them; None if they are positional tensors."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args), None  # which is faster
    return tree_flatten((args, kwargs))


def _arguments(leaves: list[Any], spec: Any) -> Any:
    return (leaves, {}) if spec is None else tree_unflatten(leaves, spec)


def _part(x: Tensor, part: int | None) -> Tensor:
    return x if part is None else x[:part]


def _batch_of(leaves: list[Any]) -> int:
    """The number of images that all inputs have; 0 if they differ."""
    sizes = {len(x) if x.dim() else 0 for x in leaves if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def _joined(steps: Iterable[Step]) -> list[Callable[[], None]]:
    """Functions that do the steps; kernels that follow each other are called at once."""
    functions: list[Callable[[], None]] = []
    for is_call, group in groupby(steps, lambda step: isinstance(step.call, ctypes.Array)):
        calls: list[Any] = [step.call for step in group]
        if is_call:
            array = (Fields * len(calls))(*calls)
            functions.append(functools.partial(engine().run_all, array, len(calls)))
        else:
            functions += calls
    return functions


class Programs:
    """The programs of a model, by the form of its inputs.

    The first pass with inputs of a form is an ordinary one, the second is recorded.

    Args:
        module: The model; there are programs only if it [is repeatable][is_repeatable].
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_repeatable = is_repeatable(module)
        self._found: dict[Hashable, Program | str] = {}
        self._unused = 0  # programs that were forgotten before they paid for the recording
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copy begins anew
        return Programs, (self._module,)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Call the model, or repeat what it did for inputs of that form."""
        if not self._is_repeatable or _is_watched():
            return self._module(*args, **kwargs)
        leaves, spec = flat(args, kwargs)
        found = self._program(leaves, spec)
        if found is None or not found.lock.acquire(blocking=False):
            return self._module(*args, **kwargs)
        try:
            return found(leaves)
        finally:
            found.lock.release()

    def _program(self, leaves: list[Any], spec: Any) -> Program | None:
        if not all(map(_is_simple_input, leaves)) or not self._lock.acquire(blocking=False):
            return None
        try:
            key = (torch.get_num_threads(), spec, *map(_form, leaves))
            found = self._found.get(key)
            if found is None:
                while len(self._found) >= MOST_PROGRAMS:
                    oldest = self._found.pop(next(iter(self._found)))
                    self._unused += isinstance(oldest, Program) and oldest.calls < FEWEST_CALLS
                self._found[key] = _MET
            elif found is _MET and self._unused < MOST_PROGRAMS:
                found = record(self._module, leaves, spec) or _NOT_REPEATABLE
                self._found[key] = found
            return found if isinstance(found, Program) else None
        finally:
            self._lock.release()


def _is_simple(x: Any) -> bool:
    """Whether a part of an input or output holds no tensor that nobody sees."""
    return type(x) in (Tensor, nn.Parameter, bool, int, float, str, type(None))


def _is_simple_input(x: Any) -> bool:
    return is_plain(x) if isinstance(x, Tensor) else _is_simple(x)


def _is_watched() -> bool:
    """Whether someone wants to see each operation: a mode of the user's, or `torch.func`."""
    functorch = torch._C._functorch.peek_interpreter_stack()
    return bool(torch._C._len_torch_dispatch_stack()) or functorch is not None


def _form(x: Any) -> Hashable:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)
