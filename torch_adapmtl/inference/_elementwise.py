"""Operations of torch on tensors that show maps: on the memory as a whole, and maps again.

Each computes what torch does if its arguments show no maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._call import around, bits, copy_into, engine, fields, run, threads
from ._maps import Held, Map, contiguous, floats, held, padded, show


def image(x: Any) -> Held | None:
    """The map that `x` shows, if it shows images."""
    return held(x) if isinstance(x, Tensor) and x.dim() == 4 else None


def _on_map(name: str, a: Held, other: Tensor, **values: int) -> Tensor:
    """The map that a work of the kernels makes of another and `other`, in the same layout."""
    layout, kernels = a.layout, engine()
    keep, buffer = layout.keep, floats(layout.size)
    call = fields(
        work=kernels.works[name],
        parallel=kernels.parallel,
        threads=threads(layout.channels * layout.pitch),
        **around(layout, buffer),
        x=a.address,
        y=buffer.data_ptr() + 4 * layout.lead,
        pitch=layout.pitch,
        keep=0 if keep is None else keep.data_ptr(),
        channels=layout.channels,
        batch=layout.batch,
        rows=layout.rows,
        columns=layout.columns,
        **values,
    )
    run(call, (keep, other))
    return buffer


def show_like(layout: Map, buffer: Tensor, *given: Held) -> Tensor:
    """A map whose layout is that of others."""
    return show(layout, buffer, layout.shape, layout.strides, _Makers(given))


class _Makers:
    """All who made the maps that a result has its layout from."""

    def __init__(self, maps: Sequence[Held]) -> None:
        self.makers = [found.maker for found in maps if found.maker is not None]

    def ask(self, rows: int, columns: int) -> None:
        for maker in self.makers:
            maker.ask(rows, columns)


def _alike(a: Map, b: Map) -> bool:
    """Whether a position has the same place in a channel."""
    return (a.batch, a.height, a.width, a.rows, a.columns) == (
        b.batch,
        b.height,
        b.width,
        b.rows,
        b.columns,
    )


def add(x: Any, y: Any) -> Any:
    """``x + y``."""
    a, b = image(x), image(y)
    if a is None or b is None or not _alike(a.layout, b.layout) or x.shape != y.shape:
        return contiguous(x) + contiguous(y)  # else the sum would lie in memory as the map does
    return show_like(a.layout, _on_map("add", a, b.buffer, residual=b.address), a, b)


def multiply(x: Any, y: Any) -> Any:
    """``x * y``; one may be a factor for each channel, such as a squeeze-and-excitation gate."""
    if image(x) is None and image(y) is not None:
        x, y = y, x
    a = image(x)
    if (
        a is None
        or not isinstance(y, Tensor)
        or y.shape != (*x.shape[:2], 1, 1)
        or y.dtype != torch.float32
    ):
        return contiguous(x) * contiguous(y)
    factors = y.contiguous()
    return show_like(a.layout, _on_map("scale", a, factors, odd=factors.data_ptr()), a)


def mean(x: Any, dim: Sequence[int] = (-2, -1), keepdim: bool = False) -> Any:
    """The mean over height and width, which `dim` is if `x` shows a map."""
    a = image(x)
    if a is None:
        return x.mean(dim, keepdim=keepdim)
    layout, kernels = a.layout, engine()
    result = floats(layout.batch, layout.channels)
    call = fields(
        work=kernels.works["mean"],
        parallel=kernels.parallel,
        threads=threads(layout.channels * layout.pitch),
        x=a.address,
        y=result.data_ptr(),
        pitch=layout.pitch,
        channels=layout.channels,
        batch=layout.batch,
        rows=layout.rows,
        columns=layout.columns,
        low=bits(layout.height * layout.width),
    )
    run(call)
    return result[:, :, None, None] if keepdim else result


def concatenate(tensors: Sequence[Any]) -> Any:
    """``torch.cat(tensors, 1)``."""
    maps = [image(x) for x in tensors]
    given = [found for found in maps if found is not None]
    if not given or any(x.shape[2:] != tensors[0].shape[2:] for x in tensors if x.dim() == 4):
        return torch.cat(list(tensors), 1)
    if any(x.dim() != 4 or x.dtype != torch.float32 for x in tensors):
        return torch.cat(list(tensors), 1)
    batch, _, height, width = tensors[0].shape
    rows, columns = (
        max(getattr(found.layout, name) for found in given) for name in ("rows", "columns")
    )
    layout = padded(batch, sum(x.shape[1] for x in tensors), height, width, rows, columns)
    buffer, channel = floats(layout.size), 0
    for x in tensors:
        part = x if x.stride(3) == 1 else x.contiguous()
        copy_into(part, layout, buffer, channel, (0, height, 0, width))
        channel += x.shape[1]
    return show_like(layout, buffer, *given)
