"""Operations on weights, recorded so that they can be computed again from weights with zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_adapmtl.components._snapshot import storage_of

__all__ = ["Trace", "key_of", "tensors_in", "with_zeros"]


def key_of(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from all others that exist; 0 if it has none."""
    storage = storage_of(tensor)
    return 0 if storage is None else storage._cdata


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or the results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


@dataclass(frozen=True, eq=False)
class _Operation:
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    reads: frozenset[int]
    writes: frozenset[int]


class Trace:
    """The operations of a run that are on weights, other parameters and constants alone."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []

    def record(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        written: Iterable[Tensor],
    ) -> None:
        """Record an operation after it has run; `written` are arguments that it has written to."""
        reads = frozenset(map(key_of, tensors_in((*args, *kwargs.values()))))
        writes = frozenset(map(key_of, [*tensors_in((out,)), *written]))
        self._operations.append(_Operation(function, args, kwargs, out, reads, writes))

    def keeps_zeros(
        self, tensor: Tensor, start: Callable[[Tensor, int], torch.UntypedStorage]
    ) -> bool:
        """Return whether zeros of the weights are zeros of a tensor that is computed from them.

        The tensor is computed twice, each time with the other half of the weights' entries set to
        zero. An entry that is not zero one of the two times depends on entries of both halves, or
        is not zero where all entries are.

        Args:
            tensor: A tensor that the recorded operations have made.
            start: Returns the storage that a tensor begins with that no recorded operation has
                made, with half 0 or 1 of the weights' entries set to zero.
        """
        needed, operations = {key_of(tensor)}, []
        for operation in reversed(self._operations):
            if needed & operation.writes:
                operations.append(operation)
                needed |= operation.reads
        operations.reverse()
        try:
            zero = []
            for half in (0, 1):
                value = _again(tensor, operations, start, half)
                value = torch.view_as_real(value) if value.is_complex() else value
                zero.append((value == 0) | value.isnan())  # 0 / 0, of a norm of zeros only
            return bool((zero[0] | zero[1]).all())
        except Exception:  # an operation that depends on the values in its own way
            return True


def _again(
    tensor: Tensor,
    operations: Iterable[_Operation],
    start: Callable[[Tensor, int], torch.UntypedStorage],
    half: int,
) -> Tensor:
    """Compute `tensor` again, in storages of its own."""
    storages: dict[int, torch.UntypedStorage] = {}

    def swap(value: Tensor) -> Tensor:
        key = key_of(value)
        if not key:
            return value
        if key not in storages:
            storages[key] = start(value, half)
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storages[key], value.storage_offset(), value.size(), value.stride())

    for operation in operations:
        args, kwargs = tree_map_only(Tensor, swap, (operation.args, dict(operation.kwargs)))
        out = operation.function(*args, **kwargs)
        for made, again in zip(tensors_in((operation.out,)), tensors_in((out,)), strict=True):
            if (storage := storage_of(again)) is not None:
                storages.setdefault(key_of(made), storage)
    return swap(tensor)


def with_zeros(
    storage: torch.UntypedStorage, dtype: torch.dtype, half: int | None, seed: int
) -> torch.UntypedStorage:
    """Return a copy of a parameter's storage without zeros but those of one half of its entries.

    Args:
        storage: The storage.
        dtype: The dtype of the parameter.
        half: Which half is zero, 0 or 1; None for neither.
        seed: Which halves there are; they differ between parameters.
    """
    values = torch.empty(0, dtype=dtype, device=storage.device).set_(storage).clone()
    index = torch.arange(values.numel(), device=values.device)
    scale = values.abs().mean().nan_to_num(1.0)
    other = (index * 7919 % 1009 + 1) / 1009 * torch.where(scale > 0, scale, 1.0)
    values = torch.where(values == 0, other.to(dtype), values)
    if half is not None:
        spread = (index + 7919 * seed) * 2654435761 >> 13  # without a pattern
        values *= spread % 2 == half
    return values.untyped_storage()
