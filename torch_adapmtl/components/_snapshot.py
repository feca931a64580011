"""Everything a forward pass can change about a model, recorded and put back.

A probe has to run the user's model, and models write while they run: statistics, caches in plain
attributes, random numbers, lazily built tables. `untouched` brackets such a run.
"""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["untouched"]

# A container longer than this is still copied, but its elements are not looked into (vocabularies).
_LONGEST_SEARCHED = 10_000
_PLAIN = frozenset(
    [
        bool, int, float, complex, str, bytes, type(None), types.ModuleType, types.FunctionType,
        types.BuiltinFunctionType, types.MethodType, torch.device, torch.dtype, torch.Size,
    ]
)  # fmt: skip


@contextmanager
def untouched(model: nn.Module) -> Iterator[TorchDispatchMode]:
    """Leaves `model` and the random number generators as they were, also when the body raises.

    Gives a dispatch mode that the body has to run the model under, as the innermost of all modes:
    it keeps a copy of what is about to be written. There, below autograd, a write through a view,
    `.data` or `no_grad` shows as what it is.

    Put back are each module's attributes (with the contents of its dicts, lists and sets),
    training flags and hooks, the contents of buffers, parameters and other tensor attributes,
    gradients and `requires_grad`, and the state of the generators of Python, NumPy, the CPU, CUDA
    (if in use) and MPS.
    """
    record = _Record(model)
    guard = _CopyBeforeWrite(record.guarded)
    try:
        yield guard
    finally:
        record.restore()
        guard.restore()


class _Record:
    """The state of a model before the run."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._undo: list[Callable[[], object]] = []
        self._kept: list[object] = []  # what `_seen` names by id must not be collected
        self.guarded: list[Tensor] = []
        self._generators()
        for buffer in model.buffers():
            self._buffer(buffer)
        self._visit(model)

    def restore(self) -> None:
        for container, before in self._containers:
            _refill(container, before)
        for undo in self._undo:
            undo()

    def _visit(self, value: object, inside_object: bool = False) -> None:
        """Records whatever can change in and below `value`; iterative, as modules nest deeply."""
        stack = [(value, inside_object)]
        while stack:
            item, inside = stack.pop()
            if id(item) in self._seen or isinstance(item, type):
                continue
            self._seen.add(id(item))
            self._kept.append(item)
            if isinstance(item, nn.Module):
                # Reached through `_modules`, but also where one hides in a list. One that a plain
                # object holds may be any part of a program.
                if not inside:
                    self._undo.append(partial(setattr, item, "training", item.training))
                    stack.append((vars(item), False))
            elif isinstance(item, nn.Parameter):
                self._parameter(item)
            elif isinstance(item, Tensor):
                if not inside:
                    self._tensor(item)
            elif isinstance(item, torch.Generator):
                self._undo.append(partial(item.set_state, item.get_state()))
            elif isinstance(item, dict | list | set | deque):
                self._containers.append((item, item.copy()))
                if 0 < len(item) <= _LONGEST_SEARCHED:
                    values = item.values() if isinstance(item, dict) else item
                    stack += [(v, inside) for v in values if type(v) not in _PLAIN]
            elif isinstance(item, tuple):
                stack += [(v, inside) for v in item if type(v) not in _PLAIN]
            elif not inside and isinstance(getattr(item, "__dict__", None), dict):
                # One level into plain objects (feature hooks, caches), not on to a trainer's world.
                stack.append((vars(item), True))

    def _tensor(self, tensor: Tensor) -> None:
        """Guards the contents, and keeps the memory that `tensor.data = ...` would replace."""
        if tensor.is_meta:
            return
        self.guarded.append(tensor)
        data = tensor.detach()

        def undo() -> None:
            if _place(tensor) != _place(data):
                tensor.data = data

        self._undo.append(undo)

    def _parameter(self, parameter: nn.Parameter) -> None:
        grad, wanted = parameter.grad, parameter.requires_grad
        hooks = dict(parameter._backward_hooks or {})
        self._tensor(parameter)
        if grad is not None:
            self._tensor(grad)

        def undo() -> None:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter._backward_hooks is not None:
                _refill(parameter._backward_hooks, hooks)

        self._undo.append(undo)
        self._containers.append((vars(parameter), vars(parameter).copy()))

    def _buffer(self, buffer: Tensor) -> None:
        # Copied at once: some kernels (batch norm's) write statistics without saying so.
        if buffer.is_meta:
            return
        self._tensor(buffer)
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            before = buffer.clone()

        def undo() -> None:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if not torch.equal(buffer, before):
                    if buffer.shape != before.shape:
                        buffer.resize_(before.shape)
                    buffer.copy_(before)

        self._undo.append(undo)

    def _generators(self) -> None:
        self._undo.append(partial(random.setstate, random.getstate()))
        self._undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"].random
            self._undo.append(partial(numpy.set_state, numpy.get_state()))
        # Asking an accelerator that nothing has used yet would start it.
        if torch.cuda.is_initialized():
            self._undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if torch.backends.mps.is_available():
            self._undo.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))


def _refill(container: Any, before: Any) -> None:
    """Gives a container its earlier contents back, in place and in the same order."""
    if not container and not before:
        return
    if len(container) == len(before) and _same_items(container, before):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(before)
    else:
        container.extend(before)


def _same_items(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return all(a is b for a, b in zip(now, before, strict=True)) and all(
            a is b for a, b in zip(now.values(), before.values(), strict=True)
        )
    if isinstance(now, set):
        return {id(a) for a in now} == {id(b) for b in before}
    return all(a is b for a, b in zip(now, before, strict=True))


class _CopyBeforeWrite(TorchDispatchMode):
    """Copies the storage of a guarded tensor when an operation is about to write to it.

    Copying all parameters beforehand would double the memory of a large model for something that
    hardly any model does.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [s for tensor in tensors if (s := _storage(tensor)) is not None]
        self._storages = {storage.data_ptr(): storage for storage in storages}
        self._before: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False))
            named.update(kwargs or {})
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(named.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _save(self, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else (written,):
            storage = _storage(tensor)
            place = 0 if storage is None else storage.data_ptr()
            if place in self._storages and place not in self._before:
                self._before[place] = self._storages[place].clone()

    def restore(self) -> None:
        for place, before in self._before.items():
            storage = self._storages[place]
            if storage.nbytes() != before.nbytes():  # what was written has grown
                storage.resize_(before.nbytes())
            storage.copy_(before)


def _storage(tensor: Any) -> torch.UntypedStorage | None:
    """The memory of an ordinary tensor; None for sparse and other tensors without any."""
    ordinary = type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
    if not ordinary or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        storage: torch.UntypedStorage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # parameters that wrap something else
        return None
    return storage


def _place(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return 0 if storage is None else storage.data_ptr()
