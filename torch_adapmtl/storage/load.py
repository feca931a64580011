"""Small files of sparse models: reading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from torch_adapmtl.components._unwrap import unwrap

from ._blocks import BLOCK, Block, decode
from ._index import StoredTensor, read_index, scales_of
from ._safetensors import Reader
from ._values import spread, widened
from .error import SparseFileError

__all__ = ["load_sparse"]

Model = TypeVar("Model", bound=nn.Module)


@overload
def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...
@overload
def load_sparse(path: str | os.PathLike[str], model: Model) -> Model: ...
@torch.no_grad()
def load_sparse(
    path: str | os.PathLike[str], model: nn.Module | None = None
) -> nn.Module | dict[str, Tensor]:
    """Load a file that [save_sparse][torch_adapmtl.save_sparse] wrote.

    The whole file is checked before the first tensor of the model is changed. Tensors are read
    piece by piece: beside the model, only a few megabytes are needed. If the model has hooks or
    code of its own for state dicts, it loads all tensors at once, by `Module.load_state_dict`.

    Args:
        path: The file.
        model: What to load it into: a model with the same names and shapes, as for
            `Module.load_state_dict`. Its parameters stay the same objects, on their devices and in
            their types. None to get a state dict, whose size the file decides: if you do not trust
            it, look at `SparseFile.read(path).dense_size` first.

    Returns:
        The model, or the state dict.

    Raises:
        SparseFileError: If the file was not written by `save_sparse`, is damaged or cut off. It is
            a ValueError.
        ValueError: If names or shapes are not those of the model; if a tensor of it is on the meta
            device.
        RuntimeError: If `Module.load_state_dict` loads the model, and keys or shapes differ. It may
            have changed tensors before.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from torch_adapmtl import save_sparse
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> _ = save_sparse({"weight": torch.tensor([0.0, 1.0]).repeat(1000)}, path)
        >>> load_sparse(path)["weight"]
        tensor([0., 1., 0.,  ..., 1., 0., 1.])
    """
    with open(path, "rb") as file, torch.device("cpu"):  # whatever torch's default device is
        reader = Reader(file, os.fsdecode(path))
        index, contents = read_index(reader), _Contents(reader)
        if model is None:
            return contents.all(index)
        inner = unwrap(model)
        if _has_hooks(inner):
            inner.load_state_dict(contents.all(index))
            return model
        targets = _targets(inner, index, reader)
        for stored in index.values():
            for _ in contents.parts(stored):
                pass  # what is wrong shows before anything is changed
        for name, target in targets.items():
            contents.copy(index[name], target)
    return model


def _has_hooks(model: nn.Module) -> bool:
    """Whether there is code of the model's own that loads or makes state dicts."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or module._state_dict_hooks
        or module._state_dict_pre_hooks
        or any(
            not getattr(type(module), name).__module__.startswith("torch.nn.")
            for name in ("_load_from_state_dict", "load_state_dict", "state_dict")
        )
        for module in model.modules()
    )


def _targets(
    model: nn.Module, index: Mapping[str, StoredTensor], reader: Reader
) -> dict[str, Tensor]:
    """The tensors of a model that those of a file are copied to, by name."""
    state = {name: x for name, x in model.state_dict(keep_vars=True).items() if x is not None}
    problems = [f"{name!r} is missing in the file" for name in state.keys() - index.keys()]
    problems += [f"{name!r} is missing in the model" for name in index.keys() - state.keys()]
    for name in state.keys() & index.keys():
        problem = _problem(state[name], index[name])
        if problem:
            problems.append(f"{name!r} {problem}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(
            f"{reader.name} does not fit the model: {'; '.join(sorted(problems)[:5])}{more}"
        )
    return state


def _problem(x: object, stored: StoredTensor) -> str:
    """Why a tensor of a model cannot be written to; empty if it can."""
    if not isinstance(x, Tensor):
        return f"is a {type(x).__name__} in the model"
    if tuple(x.shape) != stored.shape:
        return f"has shape {tuple(x.shape)} in the model, {stored.shape} in the file"
    if x.is_meta:
        return "is on the meta device: use model.to_empty(device=...) first"
    if not torch.can_cast(stored.dtype, x.dtype):
        return f"is {x.dtype} in the model, {stored.dtype} in the file"
    is_constant = x.is_inference() and not torch.is_inference_mode_enabled()
    if x.layout is not torch.strided or x.is_quantized or is_constant or _overlaps(x):
        return "cannot be written to in the model: make it an ordinary tensor, with .clone()"
    return ""


def _overlaps(x: Tensor) -> bool:
    """Whether some elements share a place in memory, as those of `expand`."""
    return any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


class _Contents:
    """The elements of the tensors of a file."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # The pool of each type that was read last.
        self._pools: dict[torch.dtype, tuple[str, Tensor]] = {}

    def all(self, index: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """All tensors, by name; those that are tied are one tensor."""
        tensors = {id(x): self.whole(x) for x in index.values()}
        return {name: tensors[id(x)] for name, x in index.items()}

    def parts(self, stored: StoredTensor) -> Iterator[Tensor]:
        """The elements of a tensor, a few at a time."""
        for part in self._parts(stored):
            if part.dtype is torch.bool and bool((part.view(torch.uint8) > 1).any()):
                raise self._reader.error(
                    f"{stored.name!r} holds truth values that are neither 0 nor 1"
                )
            yield part

    def _parts(self, stored: StoredTensor) -> Iterator[Tensor]:
        if stored.pool is not None:
            pool = stored.pool
            name, elements = self._pools.get(pool.dtype, ("", None))
            if elements is None or name != pool.name:  # those of a type come in order
                elements = self.whole(pool)
                self._pools[pool.dtype] = pool.name, elements
            yield elements[stored.begin : stored.begin + stored.elements]
        elif stored.blocks is None:
            width = stored.dtype.itemsize
            end = stored.begin + stored.size
            for begin in range(stored.begin, end, width * BLOCK):
                data = self._reader.read(begin, min(width * BLOCK, end - begin))
                yield torch.frombuffer(bytearray(data), dtype=stored.dtype)
        else:
            yield from self._decoded(stored, stored.blocks)

    def _decoded(self, stored: StoredTensor, blocks: Sequence[Block]) -> Iterator[Tensor]:
        place = stored.begin

        def read(size: int) -> bytes:
            nonlocal place
            place += size
            return self._reader.read(place - size, size)

        count, scales, first = scales_of(stored), None, 0
        if count:
            scales = torch.frombuffer(bytearray(read(4 * count)), dtype=torch.float32)
        for block in blocks:
            try:
                values = decode(block, stored.values, read)
            except SparseFileError:
                raise
            except ValueError as error:
                raise self._reader.error(f"{stored.name!r} is damaged: {error}") from error
            if stored.values is not stored.dtype:
                row = stored.elements // max(count, 1)
                of_each = spread(scales, first, block.elements, row)
                values = widened(values, of_each, stored.dtype)
            yield values
            first += block.elements

    def whole(self, stored: StoredTensor) -> Tensor:
        """All elements of a tensor, in its shape."""
        try:
            result = torch.empty(stored.shape, dtype=stored.dtype)
        except (RuntimeError, TypeError) as error:  # the second for sizes beyond 64 bits
            raise self._reader.error(
                f"there is no memory for {stored.name!r} of shape {stored.shape}"
            ) from error
        self._fill(result.view(-1), stored)
        return result

    def copy(self, stored: StoredTensor, target: Tensor) -> None:
        """Copy a tensor into another of its shape."""
        if target.is_contiguous():
            self._fill(target.detach().view(-1), stored)
        else:
            target.copy_(self.whole(stored))

    def _fill(self, flat: Tensor, stored: StoredTensor) -> None:
        place = 0
        for part in self.parts(stored):
            flat[place : place + len(part)] = part
            place += len(part)
