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
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ._call import Fields, clock, engine
from ._copy_model import close
from ._nodes import module_of
from ._record import NotRepeatableError, Recording, Step
from ._trace import is_plain

MOST_PROGRAMS = 4  # forms of inputs that a model remembers
MOST_FLOATS = 2**24  # that a program may keep for itself, 64 MiB
MOST_IN_CACHE = 3 * 2**20  # that the activations of a part of a batch may take, 12 MiB

_MET, _NOT_REPEATABLE = "met", "not repeatable"

_NO_TENSORS = ("numpy", "tolist", "data_ptr", "__array__")  # methods that torch does not show


class Program:
    """A pass of a model with inputs of one form, or several passes with parts of a batch.

    Args:
        module: The model. It is called once.
        leaves: The inputs.
        spec: How they make the arguments.
        part: Number of images in a part of the batch; None if the batch is not split.

    Attributes:
        lock: Only one thread may call the program.
        size: Number of floats that its activations take.

    Raises:
        NotRepeatableError: If the model does more than operations on tensors.
    """

    def __init__(
        self, module: nn.Module, leaves: list[Any], spec: Any, part: int | None = None
    ) -> None:
        self.lock = threading.Lock()
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._part, self._batch = part, len(tensors[0]) if part else 0
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [x[:part].clone() if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = tree_unflatten(self._inputs, spec)
            own = (x for x in self._inputs if isinstance(x, Tensor))
            with Recording(own, MOST_FLOATS) as recording:
                self._outputs = module(*args, **kwargs)
        self._check_outputs()
        self._alive = recording.arena, recording.alive
        self.size = recording.arena.size
        self._steps = _joined(recording.steps)
        self._by_layer = [
            (layer, _joined(steps)) for layer, steps in groupby(recording.steps, lambda s: s.layer)
        ]

    def _check_outputs(self) -> None:
        outputs = tree_leaves(self._outputs)
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        if not all(map(_is_simple, outputs)):
            raise NotRepeatableError("it returns an object that may hold tensors")
        if len({x.untyped_storage().data_ptr() for x in tensors}) < len(tensors):
            raise NotRepeatableError("it returns tensors that share memory")
        if self._part and not all(x.dim() and len(x) == self._part for x in tensors):
            raise NotRepeatableError("it returns what is not a batch")

    def __call__(self, leaves: list[Any]) -> Any:
        """The outputs for other inputs of the same form."""
        if self._part is None:
            self._copy_inputs(leaves)
            self._pass()
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._outputs)
        whole = tree_map(self._empty_whole, self._outputs)
        pairs = [
            (to, x)
            for to, x in zip(tree_leaves(whole), tree_leaves(self._outputs), strict=True)
            if isinstance(x, Tensor)
        ]
        for i in range(0, self._batch, self._part):
            images = slice(i, i + self._part)
            self._copy_inputs([x[images] if isinstance(x, Tensor) else x for x in leaves])
            self._pass()
            for to, x in pairs:
                to[images] = x
        return whole

    def _empty_whole(self, x: Any) -> Any:
        """A tensor for the whole batch whose dimensions lie in memory in the order of a part's."""
        if not isinstance(x, Tensor):
            return x
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return torch.empty_permuted((self._batch, *x.shape[1:]), order, dtype=x.dtype, device="cpu")

    def _copy_inputs(self, leaves: list[Any]) -> None:
        for own, x in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(x)

    def _pass(self) -> None:
        for step in self._steps:
            step()

    @property
    def _parts(self) -> int:
        return self._batch // self._part if self._part else 1

    def run(self) -> None:
        """Repeat what was recorded, for as many parts as the batch has."""
        for _ in range(self._parts):
            self._pass()

    def seconds(self) -> dict[str, float]:
        """The time that each layer takes in that."""
        result: dict[str, float] = {}
        for layer, steps in self._by_layer:
            begin = clock()
            for step in steps:
                step()
            result[layer] = result.get(layer, 0.0) + self._parts * (clock() - begin)
        return result


def record(module: nn.Module, leaves: list[Any], spec: Any) -> Program:
    """A program for a model and inputs; batches whose maps would not fit into caches are split.

    Raises:
        NotRepeatableError: If the model does more than operations on tensors, or if it takes too
            much memory.
    """
    batch = _batch_of(leaves)
    if batch > 1:
        try:
            one = Program(module, leaves, spec, 1)
            most = max(MOST_IN_CACHE, one.size)
            part = max(n for n in range(1, batch + 1) if batch % n == 0 and n * one.size <= most)
            if part < batch:
                program = one if part == 1 else Program(module, leaves, spec, part)
                _check_parts(program, module, leaves, spec)
                return program
        except Exception:  # whatever torch raises for parts of what is no batch
            pass
    return Program(module, leaves, spec)


def _check_parts(program: Program, module: nn.Module, leaves: list[Any], spec: Any) -> None:
    """Refuse to split a batch whose images see each other: here they differ, whatever was given."""
    random = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(x.shape, generator=random, dtype=x.dtype, device="cpu")
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in leaves
    ]
    args, kwargs = tree_unflatten(leaves, spec)
    if not close(program(leaves), module(*args, **kwargs), 1e-5):
        raise NotRepeatableError("outputs depend on the whole batch")


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
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copy begins anew
        return Programs, (self._module,)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Call the model, or repeat what it did for inputs of that form."""
        if not self._is_repeatable or torch._C._len_torch_dispatch_stack():
            return self._module(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        found = self._program(leaves, spec)
        if found is None or not found.lock.acquire(blocking=False):
            return self._module(*args, **kwargs)
        try:
            return found(leaves)
        finally:
            found.lock.release()

    def _program(self, leaves: list[Any], spec: Any) -> Program | None:
        if not all(map(_is_simple, leaves)) or not self._lock.acquire(blocking=False):
            return None
        try:
            key = (torch.get_num_threads(), spec, *map(_form, leaves))
            found = self._found.get(key)
            if found is None:
                while len(self._found) >= MOST_PROGRAMS:
                    del self._found[next(iter(self._found))]
                self._found[key] = _MET
            elif found is _MET:
                try:
                    found = record(self._module, leaves, spec)
                except NotRepeatableError:
                    found = _NOT_REPEATABLE
                self._found[key] = found
            return found if isinstance(found, Program) else None
        finally:
            self._lock.release()


def _is_simple(x: Any) -> bool:
    """Whether a part of an input or output holds no tensor that nobody sees."""
    return type(x) in (Tensor, nn.Parameter, bool, int, float, str, type(None))


def _form(x: Any) -> Hashable:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)


def is_repeatable(module: nn.Module) -> bool:
    """Whether a model is a graph of what torch shows: its operations, and calls of kernels."""
    if not isinstance(module, fx.GraphModule):
        return False
    for node in module.graph.nodes:
        if node.op == "call_module":
            part = module_of(module, node)
            if isinstance(part, fx.GraphModule):
                known = is_repeatable(part)
            else:
                known = is_plain(part) and _is_known(type(part).__module__)
        elif node.op == "call_function":
            known = _is_known(getattr(node.target, "__module__", None) or "torch")
        else:
            known = node.target not in _NO_TENSORS
        if not known:
            return False
    return True


def _is_known(module: str) -> bool:
    package = module.partition(".")[0]
    return package in ("torch", "_operator", "operator", "math", "builtins") or module.startswith(
        __package__
    )
