"""Calls of the kernels."""

from __future__ import annotations

import ctypes
import functools
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ._kernels.compile import Kernels, host_width, kernels
from ._kernels.fields import FIELD, FIELDS
from ._maps import Map
from ._record import STATE, NotRepeatableError

# Multiply-adds, or floats to copy, below which a second thread costs more than it saves.
SMALL = 400_000

Fields = ctypes.c_int64 * len(FIELDS)
NEXT, THREADS, LEAD, TAIL = (FIELD[name] for name in ("next", "threads", "lead", "tail"))
X, Y, RESIDUAL = FIELD["x"], FIELD["y"], FIELD["residual"]


@functools.cache
def engine() -> Kernels:
    """The kernels for this processor."""
    return kernels(host_width())


def clock() -> float:
    """Seconds; of this thread if torch has one, so that other programs do not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def threads(work: int) -> int:
    """How many threads so much work is worth."""
    return torch.get_num_threads() if work > SMALL else 1


def run(call: ctypes.Array[ctypes.c_int64], alive: Any = None) -> None:
    """Do what a call describes, in as many threads as it says.

    Args:
        call: The fields.
        alive: What holds the memory that the fields point to.
    """
    kernels, count = engine(), call[THREADS]
    by_python = count > 1 and not kernels.parallel  # no OpenMP that we know: threads of Python's
    if STATE.recording is not None:
        if by_python:
            raise NotRepeatableError("threads of Python's do a part of it")
        STATE.recording.add_call(call, alive)
    if by_python:
        call[THREADS] = 1
        others = [_pool().submit(kernels.run, call) for _ in range(count - 1)]
        kernels.run(call)
        for other in others:
            other.result()
    else:
        kernels.run(call)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="torch_adapmtl")


def fields(**values: int) -> ctypes.Array[ctypes.c_int64]:
    """The fields of a call, by name; the others are 0."""
    result = Fields()
    for name, value in values.items():
        result[FIELD[name]] = value
    return result


def around(layout: Map, buffer: Tensor) -> dict[str, int]:
    """The fields of what lies before and after the channels of a map that is written."""
    return {
        "lead": buffer.data_ptr(),
        "lead_bytes": 4 * layout.lead,
        "tail": buffer.data_ptr() + 4 * (layout.size - layout.lead),
        "tail_bytes": 4 * layout.lead,
    }


def bits(number: float) -> int:
    """The bits of a number as a float."""
    return int.from_bytes(struct.pack("<f", number), "little")


def copy_into(
    x: Tensor,
    layout: Map,
    buffer: Tensor,
    channel: int,
    place: tuple[int, int, int, int],
    step: int = 1,
    fill: float = 0,
) -> None:
    """Copy images into channels of a map, from `channel` on.

    Args:
        x: Shape ``(batch, channels, height, width)``; the last stride is 1.
        layout: The layout of the map.
        buffer: The memory of the map.
        channel: The first channel that is written.
        place: In each image of the map, the first row that is written and the end of the rows, and
            the same of the columns.
        step: Every so many columns of `x` are read, 1 or 2.
        fill: What the rest of the channels becomes.
    """
    first_row, last_row, first_column, last_column = place
    run(
        fields(
            **_copy_fields(x, layout, buffer, channel, (first_row, last_row), fill),
            work=engine().works["copy"],
            first_column=first_column,
            last_column=last_column,
            x_step=step,
        ),
        x,
    )


def deinterleave(
    x: Tensor,
    layout: Map,
    buffer: Tensor,
    channels: Sequence[int],
    rows: tuple[int, int],
    padding: int,
    fill: float,
) -> None:
    """Copy the even and the odd columns of padded images into two ranges of channels of a map.

    Args:
        x: Shape ``(batch, channels, height, width)``; the last stride is 1.
        layout: The layout of the map.
        buffer: The memory of the map.
        channels: The first channel for the even columns, and for the odd ones.
        rows: The first row that is written in each image of the map, and the end.
        padding: Columns of padding to the left of `x`, which count.
        fill: What the rest of the channels becomes.
    """
    # With an odd padding, the even columns of x are odd ones of the padded images.
    even, odd = channels if padding % 2 == 0 else reversed(channels)
    evens, odds = padding // 2, (padding + 1) // 2
    columns = min(x.shape[3], 2 * (layout.width - evens), 2 * (layout.width - odds) + 1)
    run(
        fields(
            **_copy_fields(x, layout, buffer, even, rows, fill),
            work=engine().works["deinterleave"],
            odd=buffer.data_ptr() + 4 * (layout.lead + odd * layout.pitch),
            evens=evens,
            odds=odds,
            x_columns=max(columns, 0),
        ),
        x,
    )


def interleave(
    even: Tensor, odd: Tensor, layout: Map, buffer: Tensor, row: int, *, clear: bool
) -> None:
    """Write the columns of two batches of images in turn into every second row of a map.

    Args:
        even: Shape ``(batch, channels, height, width)``; the last stride is 1. The even columns.
        odd: The odd columns, in the same shape and strides.
        layout: The layout of the map, of images of twice the height and width.
        buffer: The memory of the map.
        row: The first row that is written in each image of the map, 0 or 1.
        clear: Whether to set the rest of the map to zero.
    """
    common = _copy_fields(even, layout, buffer, 0, (row, even.shape[2]), 0)
    common["fill"] = int(clear)
    work = engine().works["interleave"]
    call = fields(**common, work=work, odd=odd.data_ptr(), x_columns=even.shape[3], x_step=2)
    run(call, (even, odd))


def _copy_fields(
    x: Tensor, layout: Map, buffer: Tensor, channel: int, rows: tuple[int, int], fill: float
) -> dict[str, int]:
    return {
        "parallel": engine().parallel,
        "threads": threads(x.shape[1] * layout.pitch),
        "x": x.data_ptr(),
        "y": buffer.data_ptr() + 4 * (layout.lead + channel * layout.pitch),
        "pitch": layout.pitch,
        "channels": x.shape[1],
        "batch": layout.batch,
        "rows": layout.rows,
        "columns": layout.columns,
        "first_row": rows[0],
        "last_row": rows[1],
        "x_channel": x.stride(1),
        "x_image": x.stride(0),
        "x_row": x.stride(2),
        "fill": bits(fill),
        **around(layout, buffer),
    }


def transpose_into(x: Tensor, buffer: Tensor, pitch: int) -> None:
    """Write the transpose of a matrix to rows that lie `pitch` floats apart."""
    kernels, (rows, columns) = engine(), x.shape
    if min(rows, columns) < kernels.width or x.stride(1) != 1:
        buffer.as_strided((columns, rows), (pitch, 1)).copy_(x.t())
        return
    call = fields(
        work=kernels.works["transpose"],
        parallel=kernels.parallel,
        threads=threads(rows * columns),
        x=x.data_ptr(),
        y=buffer.data_ptr(),
        pitch=pitch,
        rows=rows,
        columns=columns,
        x_row=x.stride(0),
    )
    run(call, x)
