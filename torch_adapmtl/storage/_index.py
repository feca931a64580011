"""The index of a file: what each entry of it holds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ._blocks import BLOCK, PLANES, Block
from ._safetensors import CODES, DTYPES, Reader, elements, naturals, parse
from .error import SparseFileError

INDEX, VERSION = "torch_adapmtl.index", 1  # the entry of the index; the version of the format
POOL = "torch_adapmtl.small."  # and a type: the entry of the small tensors of the type
MOST_INDEX = 50_000_000  # bytes, unpacked
TIMES_INDEX = 100  # as large as it is packed, but for small ones


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its name.
        dtype: The type that it is loaded as.
        shape: Its shape.
        values: The type of the values in the file.
        size: Bytes that it takes, without the header. Small tensors of a type have an entry in
            common, of which each takes the share of its elements.
        blocks: Where its blocks lie; None if its elements are stored as they are, or in an entry
            with others.
        error: By how much its values differ from those that were given, as a share of their norm.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: torch.dtype
    size: int
    blocks: tuple[Block, ...] | None = None
    error: float = 0.0
    pool: StoredTensor | None = field(default=None, compare=False, repr=False)
    begin: int = field(default=0, compare=False, repr=False)  # byte of the file, element of a pool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return elements(self.shape)

    @property
    def dense_size(self) -> int:
        """Bytes as it is loaded."""
        return self.elements * self.dtype.itemsize

    @property
    def left_out(self) -> int:
        """Number of zeros that the file only counts."""
        return sum(block.elements - block.kept for block in self.blocks or ())


def scales_of(x: StoredTensor) -> int:
    """Number of scales before the blocks of a tensor, each a float32."""
    return x.shape[0] if x.values is not x.dtype and x.values is torch.int8 else 0


def pooled(pool: StoredTensor, name: str, shape: tuple[int, ...], begin: int) -> StoredTensor:
    """A tensor in an entry of many, from one of its elements on."""
    size = round(pool.size * elements(shape) / max(pool.elements, 1))
    return StoredTensor(name, pool.dtype, shape, pool.dtype, size, pool=pool, begin=begin)


def _record(x: StoredTensor) -> dict[str, Any]:
    """What the index says of a tensor, beside its name."""
    if x.pool is not None:
        return {"in": x.pool.name, "shape": list(x.shape)}
    if x.blocks is None:
        return {}
    record: dict[str, Any] = {"dtype": CODES[x.dtype], "shape": list(x.shape)}
    if x.values is not x.dtype:
        record |= {"values": CODES[x.values], "error": x.error}
    return {**record, "blocks": [[b.kept, b.distances, *b.planes] for b in x.blocks]}


def pack_index(
    stored: Iterable[StoredTensor], pools: Iterable[StoredTensor], tied: Mapping[str, str]
) -> bytes:
    """The index of a file.

    Args:
        stored: The tensors.
        pools: The entries that hold several small ones.
        tied: For each name that is not stored, the name of the tensor that it shares.
    """
    index = {
        "tensors": {x.name: _record(x) for x in stored},
        "pools": {x.name: _record(x) for x in pools},
        "tied": dict(tied),
    }
    return zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)


def read_index(reader: Reader) -> dict[str, StoredTensor]:
    """The tensors of a file, in order, then those that share the memory of others.

    Raises:
        SparseFileError: If the file has no index, or a wrong one.
    """
    version = reader.metadata.get("torch_adapmtl")
    if version != str(VERSION):
        raise reader.error(
            f"it has version {version!r:.20} of the format, this library reads {VERSION}: upgrade "
            "torch-adapmtl"
        )
    try:
        return _index(reader, parse(_unpacked(reader)))
    except SparseFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise reader.error(f"its index is damaged: {error!r:.200}") from error


def _unpacked(reader: Reader) -> bytes:
    entry, decoder = reader.entries[INDEX], zlib.decompressobj()
    most = min(2**20 + TIMES_INDEX * entry.size, MOST_INDEX)
    try:
        result = decoder.decompress(reader.read(entry.begin, entry.size), most)
    except zlib.error as error:
        raise ValueError(f"zlib says {error}") from error
    if not decoder.eof or decoder.unused_data:
        raise ValueError("it does not end where it should")
    return result


def _is_share(error: Any) -> bool:
    return type(error) in (int, float) and 0 <= error <= 1


def _index(reader: Reader, index: Any) -> dict[str, StoredTensor]:
    if index.keys() != {"tensors", "pools", "tied"}:
        raise ValueError(f"it has the keys {list(index)!r:.99}")
    entries = {name: entry for name, entry in reader.entries.items() if name != INDEX}
    pools = {name: _in_entry(entries.pop(name), name, x) for name, x in index["pools"].items()}
    filled, result = dict.fromkeys(pools, 0), {}
    for name, record in index["tensors"].items():
        if "in" in record:
            pool, shape = pools[record["in"]], tuple(naturals(record["shape"]))
            result[name] = pooled(pool, name, shape, filled[pool.name])
            filled[pool.name] += elements(shape)
        else:
            result[name] = _in_entry(entries.pop(name), name, record)
    if entries or any(pool.shape != (filled[name],) for name, pool in pools.items()):
        raise ValueError("it does not name all that is in the file")
    tied = index["tied"]
    if result.keys() & tied.keys():
        raise ValueError("it names a tensor twice")
    return {**result, **{name: result[source] for name, source in tied.items()}}


def _in_entry(entry: Any, name: str, record: Any) -> StoredTensor:
    """A tensor in an entry of its own.

    Raises:
        ValueError: If its record does not fit the entry.
    """
    if not record:
        return StoredTensor(
            name, entry.dtype, entry.shape, entry.dtype, entry.size, begin=entry.begin
        )
    dtype, shape = DTYPES[record["dtype"]], tuple(naturals(record["shape"]))
    values, error = DTYPES[record.get("values", record["dtype"])], record.get("error", 0.0)
    given, left = record["blocks"], elements(shape)
    is_known = values in PLANES and _is_share(error) and isinstance(given, list)
    if not is_known or (entry.dtype, len(entry.shape)) != (torch.uint8, 1):
        raise ValueError(f"the record of {name!r} is {record!r:.200}")
    if values is not dtype and not (dtype.is_floating_point and shape):
        raise ValueError(f"{dtype} of shape {shape} is not stored as {values}")
    planes, blocks = PLANES[values], []
    for numbers in given:
        kept, distances, *coded = naturals(numbers)
        count = min(BLOCK, left)
        left -= count
        if not count or kept > count or len(coded) != planes:
            raise ValueError(f"a block of {count:,} elements is {numbers!r:.99}")
        if kept == count and distances:
            raise ValueError("a block without zeros has distances")
        rest = kept * (values.itemsize - planes)
        blocks.append(Block(count, kept, distances, tuple(coded), rest))
    stored = StoredTensor(
        name, dtype, shape, values, entry.size, tuple(blocks), error, begin=entry.begin
    )
    if left or 4 * scales_of(stored) + sum(block.size for block in blocks) != entry.size:
        raise ValueError(f"the blocks of {name!r} do not fill its entry")
    return stored
