"""Runs every work of the kernels on memory that ends, or begins, where no page is.

    python guarded.py WIDTH... [--beyond]

A read or write past a buffer ends the process by a signal. On the other side of each buffer lie
canaries up to the page's edge; a write there makes it exit with an error. `--beyond` does read
past a buffer, to show that it would be seen.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from skipping import sparse, vectors_of
from torch import Tensor, nn

from torch_adapmtl.inference import _call, _elementwise, _map_modules, _maps
from torch_adapmtl.inference._filters import Filters
from torch_adapmtl.inference._layers import Activation, SparseLinear
from torch_adapmtl.inference._map_modules import MapActivation, MapMaxPool2d, MapUpsample
from torch_adapmtl.inference._transposed import SparseConvTranspose2d
from torch_adapmtl.inference._windows import SparseConv2d

PAGE = mmap.PAGESIZE
CANARY = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Fence:
    """Gives out memory between two pages that may not be touched."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._blocks: list[tuple[int, int, int, int]] = []  # address, pages, begin, bytes

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Tensor:
        """A tensor that ends, or begins, at the edge of a page; what it holds is NaN."""
        count = torch.Size(shape).numel()
        needed = 4 * max(1, count)
        pages = -(-needed // PAGE)
        size = (pages + 2) * PAGE
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        for edge in (address, address + (pages + 1) * PAGE):
            assert _libc.mprotect(edge, PAGE, 0) == 0
        inner = address + PAGE
        ctypes.memset(inner, CANARY, pages * PAGE)
        begin = inner + pages * PAGE - needed if self.at_end else inner
        self._blocks.append((address, pages, begin, needed))
        memory = (ctypes.c_byte * needed).from_address(begin)
        tensor = torch.frombuffer(memory, dtype=dtype)[:count].view(shape)
        return tensor.fill_(torch.nan if dtype.is_floating_point else -1)

    def copy(self, x: Tensor) -> Tensor:
        """The same in such memory."""
        return self.empty(x.shape, dtype=x.dtype).copy_(x)

    def check(self) -> None:
        """Look at the canaries, and give the memory back."""
        for address, pages, begin, needed in self._blocks:
            inner, end = address + PAGE, address + (pages + 1) * PAGE
            before = ctypes.string_at(inner, begin - inner)
            after = ctypes.string_at(begin + needed, end - begin - needed)
            assert {*before, *after} <= {CANARY}, "written to what lies beside a buffer"
            assert _libc.munmap(address, (pages + 2) * PAGE) == 0
        self._blocks.clear()


def fenced(fence: Fence) -> ExitStack:
    """Let all that the kernels get lie in such memory."""
    fenced_torch = mock.Mock(wraps=torch)
    fenced_torch.empty = fence.empty
    fenced_torch.float32, fenced_torch.int32 = torch.float32, torch.int32
    call, keep, fields = Filters.call, _maps.Map.keep.func, _map_modules.fields

    def moved_call(self: Filters, *args: Any) -> Any:
        made, alive = call(self, *args)
        moved = {t.data_ptr(): fence.copy(t) for t in alive}
        for i, value in enumerate(made):
            if value in moved:
                made[i] = moved[value].data_ptr()
        return made, list(moved.values())

    def moved_keep(self: _maps.Map) -> Any:
        mask = keep(self)
        return None if mask is None else fence.copy(mask)

    def moved_fields(**values: int) -> Any:  # the offsets of max pooling
        count = values["rows"]
        given = (ctypes.c_int32 * count).from_address(values["nonzeros"])
        values["nonzeros"] = fence.copy(torch.tensor(list(given), dtype=torch.int32)).data_ptr()
        return fields(**values)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(_maps, "torch", fenced_torch))
    stack.enter_context(mock.patch.object(Filters, "call", moved_call))
    stack.enter_context(mock.patch.object(_maps.Map, "keep", property(moved_keep)))
    stack.enter_context(mock.patch.object(_map_modules, "fields", moved_fields))
    return stack


def integer(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def image(fence: Fence, channels: int, least: int = 1) -> Tensor:
    """A random batch, of which rows and columns may be left out."""
    x = fence.copy(torch.randn(integer(1, 3), channels, integer(least, 24), integer(least, 40)))
    return x[:, :, :: integer(1, 2)] if x.shape[2] > 2 * least else x


def convolve(fence: Fence) -> None:
    groups, ins, outs = integer(1, 2), integer(1, 4), integer(1, 5)
    kernel = integer(1, 5), integer(1, 7)
    weight = sparse(groups * outs, ins, *kernel, sparsity=integer(0, 10) / 10)
    module = (None, nn.ReLU(), nn.Hardswish(), nn.SiLU())[integer(0, 3)]
    layer = SparseConv2d(
        weight,
        torch.randn(groups * outs),
        (integer(1, 3), integer(1, 3)),
        (integer(0, 3), integer(0, 3)),
        integer(1, 3),
        groups,
        activation=Activation(module),
    )
    x = image(fence, groups * ins, 19)
    y = layer(x)
    layer(x, fence.copy(torch.randn(y.shape)))
    layer(x, y)
    following = SparseConv2d(sparse(3, groups * outs, 3, 3, sparsity=0.5), None, 1, 1)
    layer.calibrating = following.calibrating = True
    for _ in range(2):
        following(layer(x))


def transpose(fence: Fence) -> None:
    ins, outs = integer(1, 50), integer(1, 50)
    layer = SparseLinear(sparse(outs, ins, sparsity=0.7), torch.randn(outs), Activation(nn.ReLU()))
    wide = fence.copy(torch.randn(integer(1, 60), ins + integer(0, 9)))
    layer(wide[:, wide.shape[1] - ins :])
    layer(wide[:, :ins])


def up(fence: Fence) -> None:
    ins, outs = integer(1, 4), integer(1, 4)
    weight = sparse(ins, outs, integer(1, 4), integer(1, 4), sparsity=0.5)
    layer = SparseConvTranspose2d(weight, None, (integer(1, 3), integer(1, 3)))
    by_two = SparseConvTranspose2d(weight, None, 2)  # a work of its own
    for _ in range(2):
        layer(image(fence, ins))
        by_two(image(fence, ins))
        by_two.ask(integer(0, 2), integer(0, 2))


def maximum(fence: Fence) -> None:
    channels, kernel = integer(1, 4), integer(1, 4)
    y = SparseConv2d(sparse(channels, channels, 3, 3, sparsity=0.5), None, 1, 1)(
        image(fence, channels, 9)
    )
    pool = MapMaxPool2d(nn.MaxPool2d(kernel, integer(1, 3), integer(0, kernel // 2)))
    margin = integer(0, 2)
    pool.ask(margin, margin)
    pool(y)
    pool(image(fence, channels, 9))


def between(fence: Fence) -> None:
    channels = integer(1, 4)
    layer = SparseConv2d(sparse(channels, channels, 3, 3, sparsity=0.5), None, 1, 1)
    x = image(fence, channels, 9)
    y = layer(x)
    _elementwise.add(y, y)
    _elementwise.multiply(y, torch.rand(*y.shape[:2], 1, 1))
    _elementwise.mean(y)
    _elementwise.concatenate([y, x, y])
    pool = SparseConv2d(sparse(channels, channels, 1, 1, sparsity=0.5), None)
    small = pool(fence.copy(torch.randn(integer(1, 17), channels, integer(1, 3), integer(1, 3))))
    _elementwise.multiply(small, fence.copy(torch.rand(*small.shape[:2], 1, 1)))
    _elementwise.mean(small)
    up = MapUpsample()
    up.ask(integer(0, 2), integer(0, 2))
    up(y, scale_factor=2)
    MapActivation(nn.SiLU())(y)


def beyond(fence: Fence) -> None:
    """A copy of one row more than there is."""
    x, layout = fence.copy(torch.randn(1, 1, 4, 16)), _maps.padded(1, 1, 5, 16, 5, 16)
    longer = x.as_strided((1, 1, 4, 16), (64, 64, 16, 1))
    _call.copy_into(longer, layout, fence.empty((layout.size,)), 0, (0, 5, 0, 16))


WORKS: tuple[Callable[[Fence], None], ...] = (convolve, transpose, up, maximum, between)


def main(width: int, works: tuple[Callable[[Fence], None], ...]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with vectors_of(width), mock.patch.object(_call, "SMALL", 5_000), torch.no_grad():
        for i in range(80):
            fence = Fence(at_end=i % 2 == 0)
            with fenced(fence):
                works[i // 2 % len(works)](fence)
            fence.check()
    print(f"nothing was touched by vectors of {width}")


if __name__ == "__main__":
    for number in sys.argv[1:]:
        if number.isdigit():
            main(int(number), (beyond,) if "--beyond" in sys.argv else WORKS)
