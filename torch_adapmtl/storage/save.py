"""Small files of sparse models: writing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_adapmtl.components._unwrap import unwrap
from torch_adapmtl.run import plain_state_dict

from ._blocks import BLOCK, PLANES, Block, encode, memory
from ._index import INDEX, POOL, VERSION, StoredTensor, pack_index, pooled
from ._safetensors import CODES, Writer
from ._values import NARROW, Narrowing
from .file import SparseFile

__all__ = ["plain_tensors", "save_sparse"]

SMALL = 2**14  # elements; tensors of fewer share an entry with others
FULL = 2**20  # elements; an entry of small tensors that has so many is written


@torch.no_grad()
def save_sparse(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> SparseFile:
    """Save a model's weights in a small file, in which zeros take almost no room.

    [load_sparse][torch_adapmtl.load_sparse] gives back the same bits. The file is a safetensors
    file: it holds no code, and any reader of safetensors shows its entries. A tensor that does not
    become smaller is an entry as in any such file. Another one is an entry of bytes: the distances
    between its nonzeros and their exponents, both compressed by the Huffman code of zlib, and the
    other bits of the nonzeros. [The page on files](../recipes/files.md) has the format, and a
    reader of it that needs numpy only.

    The file is written next to `path` under another name and takes its place when it is whole.

    Args:
        model: A model, or a state dict. Of a model, the weights are saved that it computes with,
            under the names that they have without this library or masks of
            `torch.nn.utils.prune`. A state dict is saved as it is. Tensors on other devices are
            copied piece by piece.
        path: The file.
        dtype: A type of fewer bits for the values of tensors of two or more dimensions and 16,384
            elements or more: `torch.bfloat16`, `torch.float16`, or `torch.int8` with one scale for
            each row of the first dimension (the output channels, but for transposed convolutions).
            They are loaded in the type that they have now. `SparseFile.tensors` says by how much
            they differ. A tensor that this would not make smaller stays as it is.

    Returns:
        What the file holds and how large it is; print it.

    Raises:
        TypeError: If `model` is none of both; if something in the state dict is not a plain tensor,
            such as extra state or a DTensor, or is of a type that safetensors files do not have.
        ValueError: If `dtype` is another one, or cannot hold a value; if a tensor is on the meta
            device.

    Example:
        >>> import tempfile, torch
        >>> from torch.nn.utils import prune
        >>> from torch_adapmtl import load_sparse
        >>> layer = prune.l1_unstructured(torch.nn.Linear(512, 512), "weight", 0.9)
        >>> path = tempfile.mkdtemp() + "/layer.safetensors"
        >>> file = save_sparse(layer, path)
        >>> file.size < file.dense_size / 9
        True
        >>> plain = load_sparse(path, torch.nn.Linear(512, 512))
        >>> torch.equal(plain.weight, layer.weight)
        True
    """
    if dtype is not None and dtype not in NARROW:
        raise ValueError(f"dtype must be one of {', '.join(map(str, NARROW))}, found {dtype}")
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(f"model must be a module or a state dict, found {type(model).__name__}")
    tensors = plain_tensors(model) if isinstance(model, nn.Module) else dict(model)
    for name, x in tensors.items():
        _check(name, x)
    # Whatever torch's default device is.
    with torch.device("cpu"), Writer(path, {"format": "pt", "torch_adapmtl": str(VERSION)}) as file:
        stored, pools, tied = _write(file, tensors, dtype)
        file.write(pack_index(stored, pools, tied))
        file.add(INDEX, torch.uint8, [file.pending])
        size = file.finish()
    return SparseFile(os.fsdecode(path), size, tuple(stored), tuple(tied.items()))


def _write(
    file: Writer, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[list[StoredTensor], list[StoredTensor], dict[str, str]]:
    """Write all tensors; return those that are stored, the pools of small ones, and the tied."""
    stored: dict[str, StoredTensor] = {}
    small: defaultdict[torch.dtype, list[str]] = defaultdict(list)
    room: defaultdict[torch.dtype, int] = defaultdict(lambda: FULL)
    pools: list[StoredTensor] = []
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}

    def write_pool(names: list[str]) -> None:
        flat = torch.cat([tensors[name].detach().reshape(-1).cpu() for name in names])
        number = sum(pool.dtype is flat.dtype for pool in pools)
        pools.append(_stored(file, f"{POOL}{CODES[flat.dtype]}.{number}", flat, None))
        place = 0
        for name in names:
            stored[name] = pooled(pools[-1], name, tuple(tensors[name].shape), place)
            place += tensors[name].numel()

    for name, x in tensors.items():
        if x.numel() and first.setdefault(_identity(x), name) != name:
            tied[name] = first[_identity(x)]
        elif x.numel() < SMALL:
            small[x.dtype].append(name)
            room[x.dtype] -= x.numel()
            if room[x.dtype] <= 0:
                write_pool(small.pop(x.dtype))
                del room[x.dtype]
        else:
            narrow = dtype if dtype is not None and _is_wide(x, dtype) else None
            stored[name] = _stored(file, name, x.detach().resolve_conj().resolve_neg(), narrow)
    for names in small.values():
        write_pool(names)
    return [stored[name] for name in tensors if name in stored], pools, tied


def plain_tensors(model: nn.Module) -> dict[str, Any]:
    """The tensors that a model computes with, by the names that they have without masks."""
    model = unwrap(model)
    state = plain_state_dict(model.state_dict())
    masked = {
        f"{prefix}.{hook._tensor_name}" if prefix else hook._tensor_name
        for prefix, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod) and hasattr(hook, "_tensor_name")
    }
    result = {}
    for name, x in state.items():
        plain = name.removesuffix("_orig")
        if name.removesuffix("_mask") in masked and name.endswith("_mask"):
            continue
        if plain in masked and f"{plain}_mask" in state:
            result[plain] = x * state[f"{plain}_mask"] + 0  # +0.0 of -0.0
        elif x is not None:  # extra state may be None
            result[name] = x
    return result


def _check(name: Any, x: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__" or name.startswith((INDEX, POOL)):
        raise ValueError(f"a tensor cannot be saved under the name {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a tensor cannot be saved under the name {name!r}: no UTF-8") from None
    if type(x) not in (Tensor, nn.Parameter, nn.Buffer):
        raise TypeError(
            f"{name!r} is a {type(x).__name__}, but only plain tensors can be saved: "
            "leave it out of the state dict, or make a tensor of it"
        )
    if x.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values: load the model first")
    if x.layout is not torch.strided or x.dtype not in CODES:
        raise TypeError(
            f"{name!r} is a tensor of {x.layout} and {x.dtype}, for which safetensors files have "
            "no type: convert it"
        )


def _identity(x: Tensor) -> Any:
    return x.device, x.dtype, x.data_ptr(), x.shape, x.stride(), x.is_conj(), x.is_neg()


def _is_wide(x: Tensor, narrow: torch.dtype) -> bool:
    """Whether fewer bits make a tensor smaller: each row of integers has a scale of four bytes."""
    if not x.is_floating_point() or x.dim() < 2:
        return False
    saved = int(x.count_nonzero()) * (x.element_size() - narrow.itemsize)
    return saved > (4 * len(x) if narrow is torch.int8 else 0)


def _stored(file: Writer, name: str, x: Tensor, narrow: torch.dtype | None) -> StoredTensor:
    """Write a tensor into an entry of its own."""
    shape, flat = tuple(x.shape), x.reshape(-1)
    if narrow is not None:
        try:
            narrowing = Narrowing(x, narrow)
            if narrowing.scales is not None:
                file.write(memory(narrowing.scales))
            blocks = _write_blocks(file, flat, narrowing)
            error = narrowing.error
        except ValueError as problem:
            raise ValueError(f"{name!r} {problem}: choose another dtype") from None
        size = file.add(name, torch.uint8, [file.pending])
        return StoredTensor(name, x.dtype, shape, narrow, size, blocks, error)
    if x.dtype in PLANES and len(flat):
        blocks = _write_blocks(file, flat, None)
        if file.pending < x.nbytes:
            size = file.add(name, torch.uint8, [file.pending])
            return StoredTensor(name, x.dtype, shape, x.dtype, size, blocks)
        file.forget()
    for part in flat.split(BLOCK) if len(flat) else ():
        file.write(memory(part.cpu()))
    return StoredTensor(name, x.dtype, shape, x.dtype, file.add(name, x.dtype, shape))


def _write_blocks(file: Writer, flat: Tensor, narrowing: Narrowing | None) -> tuple[Block, ...]:
    blocks = []
    for first in range(0, len(flat), BLOCK):
        part = flat[first : first + BLOCK].cpu()
        block, contents = encode(part if narrowing is None else narrowing.narrow(part, first))
        for data in contents:
            file.write(data)
        blocks.append(block)
    return tuple(blocks)
