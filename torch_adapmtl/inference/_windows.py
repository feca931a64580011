"""Convolutions and pooling on maps: layers that read a window around each position."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import copy_into, deinterleave
from ._filters import Filters
from ._layers import Activation, Plan, SparseLayer, check_input, fits
from ._maps import Held, LeavesRoom, Map, contiguous, floats, held, padded, show

WASTE = 1.35  # a map may have so many times the positions of its images


def pair(value: Any) -> tuple[Any, Any]:
    """A size for both dimensions."""
    first, second = (value, value) if isinstance(value, int | float) else value
    return first, second


class Window:
    """The geometry of a window: what torch's arguments of the same names mean.

    A stride splits the input into phases: phase ``(a, b)`` holds the rows ``a, a + stride, ...``
    and the columns ``b, b + stride, ...`` of the padded input. In a phase, the window moves by one.
    """

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> None:
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)

    @property
    def moves_by_one(self) -> bool:
        """Whether the input is read as it is."""
        return self.stride == (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip(
            (height, width),
            self.padding,
            self.dilation,
            self.kernel_size,
            self.stride,
            strict=True,
        )
        out_h, out_w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        return out_h, out_w

    def phases(self, y: Tensor, x: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor, Tensor]:
        """The phases that places ``(y, x)`` in the window belong to.

        Returns:
            The phases that occur; for each place, its phase's index, and how far down and to the
            right of the output's position it lies in that phase.
        """
        (sy, sx), y, x = self.stride, y * self.dilation[0], x * self.dilation[1]
        phase = (y % sy) * sx + x % sx
        used = torch.unique(phase).tolist() or [0]
        index = torch.searchsorted(phase.new_tensor(used), phase)
        return [(p // sx, p % sx) for p in used], index, y // sy, x // sx

    def split(self, x: Tensor, phases: list[tuple[int, int]], source: Map, fill: float) -> Tensor:
        """Copy images into a map of their phases, the channels of one phase after the other."""
        buffer = floats(source.size)
        if x.stride(3) != 1:
            x = x.contiguous()
        channels = x.shape[1]
        for a in sorted({y for y, _ in phases}):
            begin, end, first = self._phase_range(0, a, x.shape[2], source.height)
            rows = x[:, :, first :: self.stride[0]]
            both = [phases.index((a, b)) for b in (0, 1) if (a, b) in phases]
            if self.stride[1] == 2 and len(both) == 2:
                places = [i * channels for i in both]
                deinterleave(rows, source, buffer, places, (begin, end), self.padding[1], fill)
                continue
            for i, (y, b) in enumerate(phases):
                if y == a:
                    left, right, skipped = self._phase_range(1, b, x.shape[3], source.width)
                    part, step = rows[..., skipped:], self.stride[1]
                    if step > 2:
                        part, step = part[..., ::step].contiguous(), 1
                    place = (begin, end, left, right)
                    copy_into(part, source, buffer, i * channels, place, step, fill)
        return buffer

    def _phase_range(self, dim: int, phase: int, size: int, most: int) -> tuple[int, int, int]:
        """Where a phase of the input is not padding, along one dimension.

        Row ``r`` of phase ``a`` is row ``r * stride + a - padding`` of the input.

        Returns:
            The first row of the phase and the end, at most `most`; the input's row that is first.
        """
        stride, before = self.stride[dim], self.padding[dim] - phase
        begin = max(0, -(-before // stride))
        end = max(begin, min((size - 1 + before) // stride + 1, most))
        return begin, end, min(begin * stride - before, size)


class SparseConv2d(LeavesRoom, SparseLayer):
    """A 2-D convolution that skips the zeros of its weight.

    Args:
        weight: Shape ``(out, in / groups, height, width)``.
        bias: One number for each output channel, or None.
        stride, padding, dilation, groups, padding_mode: As for :class:`torch.nn.Conv2d`.
        activation: What follows.
        flat: Inputs and outputs have the shape ``(batch, channels, width)``, and the height is 1:
            a 1-D convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: Activation | None = None,
        flat: bool = False,
    ) -> None:
        self.flat, self.mode = flat, "constant" if padding_mode == "zeros" else padding_mode
        reach = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
        if padding == "same":
            top, left = reach[0] // 2, reach[1] // 2
            sides = (left, reach[1] - left, top, reach[0] - top)
        else:
            top, left = (0, 0) if padding == "valid" else pair(padding)
            sides = (left, left, top, top)
        # The kernels pad with zeros, alike on both sides; anything else is padded by torch.
        by_torch = self.mode != "constant" or sides[0] != sides[1] or sides[2] != sides[3]
        self.sides = sides if by_torch else None
        self.window = Window(
            tuple(weight.shape[2:]), stride, (0, 0) if by_torch else (top, left), dilation
        )
        out, per_group = weight.shape[:2]
        row, inner, y, x = weight.nonzero().unbind(1)
        self.channels = per_group * groups
        channel = (row // (out // groups)) * per_group + inner
        if self.window.moves_by_one:
            (dy, dx), (top, left) = self.window.dilation, self.window.padding
            self.phases, column, down, right = [(0, 0)], channel, y * dy - top, x * dx - left
        else:
            self.phases, phase, down, right = self.window.phases(y, x)
            column = phase * self.channels + channel
        bias = weight.new_zeros(out) if bias is None else bias
        value, columns = weight[row, inner, y, x], len(self.phases) * self.channels
        filters = Filters(row, column, down, right, value, bias, columns)
        super().__init__(filters, activation or Activation())
        self.calibrating = False  # asks those who make the input for room
        self._source: tuple[Any, tuple[int, int]] | None = None  # who made it, and its size

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_source": None}

    def extra_repr(self) -> str:
        w = self.window
        return (
            f"{self.channels}, {self.outputs}, kernel_size={w.kernel_size}, stride={w.stride}, "
            f"padding={w.padding}, dilation={w.dilation}, nonzeros={len(self.filters)}"
        )

    def ask(self, rows: int, columns: int) -> None:
        """Leave so many rows and columns of zeros around each image of the output."""
        before = self.margin
        super().ask(rows, columns)
        if self.margin != before:
            self._plans.clear()
            if self._source is not None:
                maker, size = self._source
                maker.ask(*self._room(*size))

    def _room(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of zeros around an input of a window that moves by one."""
        out_h, out_w = self.window.output_size(height, width)
        (up, down), (left, right) = self.filters.reach
        rows = max(up, out_h + max(down, self.margin[0]) - height)
        columns = max(left, out_w + max(right, self.margin[1]) - width)
        return rows, columns

    def _calibrate(self, x: Tensor, found: Held | None) -> None:
        if found is None or found.maker is None or not self.window.moves_by_one:
            return
        height, width = x.shape[2:]
        rows, columns = self._room(height, width)
        if (height + rows) * (width + columns) <= WASTE * height * width:
            self._source = (found.maker, (height, width))
            found.maker.ask(rows, columns)

    def _make_plan(self, x: Tensor, found: Held | None) -> Plan:
        batch, channels, height, width = x.shape
        if channels != self.channels:
            raise ValueError(
                f"expected {self.channels} channels, got an input of shape {tuple(x.shape)}"
            )
        out_h, out_w = self.window.output_size(height, width)
        if out_h < 1 or out_w < 1:
            raise ValueError(
                f"the input of shape {tuple(x.shape)} is smaller than the kernel of {self}"
            )
        (up, down), (left, right) = self.filters.reach
        direct = False
        if self.window.moves_by_one:
            rows, columns = self._room(height, width)
            source = padded(batch, channels, height, width, height + rows, width + columns)
            if found is not None:
                given = found.layout
                outside = max(up * given.columns + left, down * given.columns + right)
                direct = (
                    given.rows >= source.rows
                    and given.columns >= source.columns
                    and given.lead >= outside
                )
                source = given if direct else source
        else:
            rows = out_h + max(down, self.margin[0])
            columns = out_w + max(right, self.margin[1])
            channels *= len(self.phases)
            source = padded(batch, channels, out_h + down, out_w + right, rows, columns)
        if not direct:
            outside = max(up * source.columns + left, down * source.columns + right)
            source = padded(
                batch, channels, source.height, source.width, source.rows, source.columns, outside
            )
        output = padded(batch, self.outputs, out_h, out_w, source.rows, source.columns)
        return self._plan(x.shape if found is None else found.layout, source, output, direct)

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        check_input(self, x)
        found = held(x)
        if x.dim() not in (3 - self.flat, 4 - self.flat):
            raise ValueError(
                f"expected an input of {3 - self.flat} or {4 - self.flat} dimensions, found one of "
                f"shape {tuple(x.shape)}, for {self}"
            )
        given = x
        if x.dim() == 3 - self.flat:
            if residual is not None:
                return self._add_later(x, residual)
            return self.forward(x[None]).contiguous()[0]
        if self.sides is not None:
            x, found = F.pad(x, self.sides[: 4 - 2 * self.flat], mode=self.mode), None
        if self.flat:
            x = x.unsqueeze(2)
        if not x.shape[0]:
            y = x.new_empty(0, self.outputs, *self.window.output_size(*x.shape[2:]))
            y = y.squeeze(2) if self.flat else y
            return y if residual is None else y + residual
        if self.calibrating:
            self._calibrate(x, found)
        plan = self._planned(x.shape if found is None else found.layout)
        if plan is None:
            plan = self._make_plan(x, found)
        output = plan.output
        added_map = None
        if residual is not None:
            if self.flat or not fits(residual, output.shape):
                return self._add_later(given, residual)
            added_map = self._residual(residual, output)
        if plan.direct and found is not None:
            source = found.buffer
        elif self.window.moves_by_one:
            source = _padded_copy(x, plan.source)
        else:
            source = self.window.split(x, self.phases, plan.source, 0)
        shape, strides = output.shape, output.strides
        if self.flat:
            shape, strides = shape[:2] + shape[3:], strides[:2] + strides[3:]
        return show(output, self._run(plan, source, added_map), shape, strides, self)

    def _add_later(self, x: Tensor, residual: Any) -> Tensor:
        """As torch does it: for what the kernels cannot add, such as numbers or larger tensors."""
        plain = copy.copy(self)
        plain.activation, plain._plans = Activation(), {}
        y: Tensor = contiguous(plain(x)) + residual
        return y if self.activation.module is None else self.activation.module(y)

    def _residual(self, residual: Tensor, output: Map) -> Held:
        """The residual in the layout of the output."""
        check_input(self, residual)
        if residual.shape != output.shape:
            residual = residual.expand(output.shape)
        found = held(residual)
        if found is not None:
            given = found.layout
            if (given.rows, given.columns) == (output.rows, output.columns):
                return found
            if self.calibrating and found.maker is not None:
                found.maker.ask(output.rows - output.height, output.columns - output.width)
                self.ask(given.rows - given.height, given.columns - given.width)
        buffer = _padded_copy(residual, output)
        return Held(output, buffer, buffer[output.lead :], None)


def _padded_copy(x: Tensor, layout: Map) -> Tensor:
    """The memory of a map that holds the images `x`."""
    buffer = floats(layout.size)
    if x.stride(3) != 1:
        x = x.contiguous()
    copy_into(x, layout, buffer, 0, (0, layout.height, 0, layout.width))
    return buffer
