"""Recording and restoring everything that a forward pass can change about a model.

Models change while they run: statistics, caches in plain attributes, tables made at first use, the
state of random number generators.
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

__all__ = ["storage_of", "untouched", "written_by"]

# The elements of longer containers (vocabularies) are not searched for what can change.
_LONGEST_SEARCHED = 10_000
_IMMUTABLE = frozenset(
    [
        bool, int, float, complex, str, bytes, type(None), types.ModuleType, types.FunctionType,
        types.BuiltinFunctionType, types.MethodType, torch.device, torch.dtype, torch.Size,
    ]
)  # fmt: skip


@contextmanager
def untouched(model: nn.Module) -> Iterator[TorchDispatchMode | None]:
    """Restore `model` and the random number generators afterwards, also if the body raises.

    Restored are: each module's attributes, training flag and hooks; the contents of dicts, lists
    and sets in its attributes; the contents of parameters, buffers and other tensors in its
    attributes; gradients and `requires_grad`; the state of the generators of Python, NumPy, the
    CPU, CUDA (if in use) and MPS.

    Yields:
        A dispatch mode under which the body must run the model, as the innermost of all modes. It
        copies tensors before operations write to them. A dispatch mode sees all such operations,
        also those through a view, through `.data` and under `no_grad`. None if the model is on a
        device whose tensors have no address (XLA, lazy): dispatch modes do not work there, and all
        tensors have been copied.
    """
    record = _Record(model)
    guard = None if record.opaque else _CopyBeforeWrite(record.guarded)
    try:
        yield guard
    finally:
        record.restore()
        if guard is not None:
            guard.restore()


class _Record:
    """The state of a model before the run.

    Attributes:
        guarded: The tensors whose contents are to be copied before something writes to them.
        opaque: Whether tensors of the model have no address.
    """

    def __init__(self, model: nn.Module) -> None:
        self.guarded: list[Tensor] = []
        self.opaque = False
        self._visited: dict[int, object] = {}  # by id; the objects stay alive, so ids stay theirs
        self._containers: list[tuple[Any, Any]] = []  # with a copy of each
        self._undo: list[Callable[[], object]] = []
        self._record_generators()
        for buffer in model.buffers():
            self._record_buffer(buffer)
        self._visit(model)

    def restore(self) -> None:
        for container, copied in self._containers:
            _restore_contents(container, copied)
        for undo in self._undo:
            undo()

    def _visit(self, model: nn.Module) -> None:
        """Record what can change in the model; iterative, because modules can nest deeply."""
        # Each item with whether it is in an object that is not a module. Of such objects, modules
        # and tensors are not recorded: they may be any part of the program (a trainer's, say).
        stack: list[tuple[Any, bool]] = [(model, False)]
        while stack:
            item, in_object = stack.pop()
            if id(item) in self._visited or isinstance(item, type):
                continue
            self._visited[id(item)] = item
            if isinstance(item, nn.Module):
                if not in_object:
                    self._undo.append(partial(setattr, item, "training", item.training))
                    stack.append((vars(item), False))
            elif isinstance(item, nn.Parameter):
                self._record_parameter(item)
            elif isinstance(item, Tensor):
                if not in_object:
                    self._record_tensor(item)
            elif isinstance(item, torch.Generator):
                self._undo.append(partial(item.set_state, item.get_state()))
            elif isinstance(item, dict | list | set | deque):
                self._containers.append((item, item.copy()))
                if 0 < len(item) <= _LONGEST_SEARCHED:
                    values = item.values() if isinstance(item, dict) else item
                    stack += [(v, in_object) for v in values if type(v) not in _IMMUTABLE]
            elif isinstance(item, tuple):
                stack += [(v, in_object) for v in item if type(v) not in _IMMUTABLE]
            elif not in_object and isinstance(getattr(item, "__dict__", None), dict):
                stack.append((vars(item), True))  # such as feature hooks and caches

    def _record_tensor(self, tensor: Tensor) -> None:
        """Record which memory a tensor has, for `tensor.data = ...`, and guard its contents."""
        if tensor.is_meta:
            return
        if is_opaque(tensor):
            self.opaque = True
            self._record_contents(tensor)
            return
        self.guarded.append(tensor)
        data = tensor.detach()

        def undo() -> None:
            if _address(tensor) != _address(data):
                tensor.data = data

        self._undo.append(undo)

    def _record_parameter(self, parameter: nn.Parameter) -> None:
        grad, requires_grad = parameter.grad, parameter.requires_grad
        hooks = dict(parameter._backward_hooks or {})
        self._record_tensor(parameter)
        if grad is not None:
            self._record_tensor(grad)

        def undo() -> None:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter._backward_hooks is not None:
                _restore_contents(parameter._backward_hooks, hooks)

        self._undo.append(undo)
        self._containers.append((vars(parameter), vars(parameter).copy()))

    def _record_buffer(self, buffer: Tensor) -> None:
        # Guarding is not enough: the schema of batch norm's kernels hides that they write to their
        # running statistics.
        if buffer.is_meta:
            return
        self._record_tensor(buffer)
        if not is_opaque(buffer):
            self._record_contents(buffer)

    def _record_contents(self, tensor: Tensor) -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            before = tensor.clone()

        def undo() -> None:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if not torch.equal(tensor, before):
                    if tensor.shape != before.shape:
                        tensor.resize_(before.shape)
                    tensor.copy_(before)

        self._undo.append(undo)

    def _record_generators(self) -> None:
        self._undo.append(partial(random.setstate, random.getstate()))
        self._undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"].random
            self._undo.append(partial(numpy.set_state, numpy.get_state()))
        # Asking for the state would initialise CUDA.
        if torch.cuda.is_initialized():
            self._undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if torch.backends.mps.is_available():
            self._undo.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))


def _restore_contents(container: Any, contents: Any) -> None:
    """Give a container its earlier contents, in place and in the same order."""
    if not container and not contents:
        return
    if len(container) == len(contents) and _same_items(container, contents):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(contents)
    else:
        container.extend(contents)


def _same_items(container: Any, contents: Any) -> bool:
    if isinstance(container, dict):
        return all(a is b for a, b in zip(container, contents, strict=True)) and all(
            a is b for a, b in zip(container.values(), contents.values(), strict=True)
        )
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in contents}
    return all(a is b for a, b in zip(container, contents, strict=True))


class _CopyBeforeWrite(TorchDispatchMode):
    """Copies the storage of a guarded tensor before an operation writes to it.

    To copy all parameters beforehand would double the memory of a large model, of which hardly any
    writes to its parameters.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [s for tensor in tensors if (s := storage_of(tensor)) is not None]
        self._storages = {storage.data_ptr(): storage for storage in storages}
        self._copies: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To skip dynamo, torch would load it, which takes a second; the run is eager anyway.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for written in written_by(func, args, kwargs or {}):
            self._save(written)
        return func(*args, **(kwargs or {}))

    def _save(self, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else (written,):
            address = _address(tensor)
            if address in self._storages and address not in self._copies:
                self._copies[address] = self._storages[address].clone()

    def restore(self) -> None:
        for address, copied in self._copies.items():
            storage = self._storages[address]
            if storage.nbytes() != copied.nbytes():
                storage.resize_(copied.nbytes())
            storage.copy_(copied)


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to: tensors and lists of tensors."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = dict(zip((a.name for a in schema.arguments), args, strict=False))
    named.update(kwargs)
    return [
        named.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor is on a device on which tensors have no address (XLA, lazy)."""
    if (storage := storage_of(tensor)) is None:
        return False
    try:
        storage.data_ptr()
    except RuntimeError:
        return True
    return False


def storage_of(tensor: Any) -> torch.UntypedStorage | None:
    """Return the memory of an ordinary tensor, None for sparse, empty and other tensors."""
    ordinary = type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
    if not ordinary or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        storage: torch.UntypedStorage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # parameters that wrap something else
        return None
    return storage


def _address(tensor: Any) -> int:
    storage = storage_of(tensor)
    return 0 if storage is None else storage.data_ptr()
