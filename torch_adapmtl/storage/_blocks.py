"""Tensors as short sequences of bytes: where the nonzeros are, their exponents, and the rest.

A tensor is coded in blocks of its elements. A block is, one after the other:

- the *distances*: for each nonzero, the number of zeros since the last one, as a byte; 255 stands
  for 255 zeros and says that the next byte goes on. There are none if all elements are kept.
- one or more *planes*: a byte of each element that is kept. For floating-point numbers, it is their
  exponent or its upper part; for integers, each byte has a plane.
- the *rest*: the other bytes of each element.

Distances and planes are compressed with the Huffman code of zlib. The bits of a floating-point
number are rotated to the left by one, so that the sign comes last and the exponent first. What is
zero in all its bits is a zero; -0.0 is not.
"""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**19  # elements

# How many bytes of each element have a plane.
PLANES = {
    torch.float64: 2,
    torch.float32: 1,
    torch.bfloat16: 1,
    torch.float16: 1,
    torch.int64: 8,
    torch.int32: 4,
    torch.int16: 2,
    torch.int8: 1,
    torch.uint8: 1,
    torch.bool: 1,
}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Block:
    """Where a block lies.

    Attributes:
        elements: Number of elements.
        kept: Number of elements that are kept: the nonzeros, or all.
        distances: Bytes of the compressed distances; 0 if there are none.
        planes: Bytes of the compressed planes, for each.
        rest: Bytes of the rest.
    """

    elements: int
    kept: int
    distances: int
    planes: tuple[int, ...]
    rest: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.distances + sum(self.planes) + self.rest


def encode(values: Tensor) -> tuple[Block, list[bytes]]:
    """Code a block: a contiguous tensor of one dimension on the CPU."""
    bits = values.view(_INTEGERS[values.element_size()])
    places = (bits != 0).nonzero().squeeze(1)
    planes = PLANES[values.dtype]
    is_sparse = _is_sparse(len(bits), len(places), values.element_size() - planes)
    distances = b"" if not is_sparse else _compress(_distances(places))
    kept = bits[places] if is_sparse else bits
    if values.dtype.is_floating_point:
        kept = _rotate(kept, 1)
    columns = _bytes_of(kept)
    coded = [_compress(columns[:, -1 - i].contiguous()) for i in range(planes)]
    rest = bytes(memory(columns[:, : kept.element_size() - planes].contiguous()))
    block = Block(len(bits), len(kept), len(distances), tuple(map(len, coded)), len(rest))
    return block, [distances, *coded, rest]


def _is_sparse(elements: int, nonzeros: int, rest: int) -> bool:
    """Whether to leave the zeros out costs less than what they would take.

    Distances take their entropy, but at least one bit for each nonzero; a zero that is kept takes
    at least one bit in a plane, and its rest.
    """
    p = nonzeros / elements
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q)
    return max(p, entropy) < (1 - p) * (1 + 8 * rest)


def _distances(places: Tensor) -> Tensor:
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    if not len(gaps) or int(gaps.max()) < 255:
        return gaps.to(torch.uint8)
    ends = (gaps // 255 + 1).cumsum(0)
    result = torch.full((int(ends[-1]),), 255, dtype=torch.uint8)
    result[ends - 1] = (gaps % 255).to(torch.uint8)
    return result


def decode(block: Block, dtype: torch.dtype, read: Callable[[int], bytes]) -> Tensor:
    """The elements of a block.

    Args:
        block: Where it lies.
        dtype: The type of the elements.
        read: Reads so many bytes.

    Raises:
        ValueError: If the bytes are none of a block.
    """
    places = _places(block, read(block.distances)) if block.kept < block.elements else None
    size = dtype.itemsize
    columns = torch.empty(block.kept, size, dtype=torch.uint8)
    for i, length in enumerate(block.planes):
        columns[:, size - 1 - i] = _tensor(_decompress(read(length), block.kept))
    rest = read(block.rest)
    columns[:, : size - len(block.planes)] = _tensor(rest).view(
        block.kept, size - len(block.planes)
    )
    kept = columns.view(_INTEGERS[size]).squeeze(1)
    if dtype.is_floating_point:
        kept = _rotate(kept, 8 * size - 1)
    if places is not None:
        kept = kept.new_zeros(block.elements).index_copy_(0, places, kept)
    return kept.view(dtype)


def _places(block: Block, compressed: bytes) -> Tensor:
    # Each nonzero has one byte below 255; so many zeros have at most this many bytes of 255.
    most = block.kept + (block.elements - block.kept) // 255
    distances = _tensor(_decompress(compressed, most, least=block.kept))
    ends = distances != 255
    places = torch.add(distances.int(), ends).cumsum(0, dtype=torch.int32)
    if len(places) and not bool(ends[-1]):
        raise ValueError("the distances end with a byte of 255")
    places = places[ends].long() - 1
    if len(places) != block.kept or (len(places) and int(places[-1]) >= block.elements):
        raise ValueError("the distances do not lead to as many nonzeros as there are")
    return places


def _rotate(bits: Tensor, by: int) -> Tensor:
    """Rotate integers to the left."""
    width = 8 * bits.element_size()
    low = (bits >> (width - by)) & ((1 << by) - 1)  # the shift copies the sign
    return (bits << by) | low


def _bytes_of(integers: Tensor) -> Tensor:
    """A row for each integer, with the lowest byte first."""
    return integers.contiguous().view(torch.uint8).view(len(integers), integers.element_size())


def _compress(x: Tensor) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(memory(x)) + coder.flush()


def _decompress(compressed: bytes, most: int, least: int | None = None) -> bytes:
    """What was compressed: `most` bytes, or `least` to `most` of them."""
    decoder = zlib.decompressobj(-15)
    try:
        result = decoder.decompress(compressed, most + 1)
    except zlib.error as error:
        raise ValueError(f"zlib says {error}") from error
    if not (most if least is None else least) <= len(result) <= most:
        raise ValueError(f"{len(result):,} bytes or more were compressed instead of {most:,}")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("the compressed bytes do not end where they should")
    return result


def memory(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    if not x.nbytes:  # zlib takes a null pointer for the beginning of a checksum
        return memoryview(b"")
    array: Any = (ctypes.c_ubyte * x.nbytes).from_address(x.data_ptr())
    array.tensor = x  # lives as long as its bytes are looked at
    return memoryview(array)


def _tensor(x: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(x), dtype=torch.uint8)
        if x
        else torch.empty(0, dtype=torch.uint8)
    )
