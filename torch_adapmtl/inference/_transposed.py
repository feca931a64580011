"""Transposed convolutions on maps."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._call import interleave
from ._layers import Activation, check_input
from ._maps import LeavesRoom, floats, padded, show
from ._windows import SparseConv2d, pair


class SparseConvTranspose2d(LeavesRoom, nn.Module):
    """A 2-D transposed convolution that skips the zeros of its weight.

    Each phase of the output (its rows ``a, a + stride, ...`` and columns ``b, b + stride, ...``) is
    a convolution of stride 1; one sparse layer computes all of them, then they are interleaved.

    Args:
        weight: Shape ``(in, out / groups, height, width)``.
        bias: One number for each output channel, or None.
        stride, padding, output_padding, groups, dilation: As for
            :class:`torch.nn.ConvTranspose2d`.
        activation: What follows.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.output_padding, self.groups = pair(output_padding), groups
        self.kernel_size = pair(tuple(weight.shape[2:]))
        ins, outs = weight.shape[:2]
        (sy, sx), (dy, dx), (ky, kx) = self.stride, self.dilation, self.kernel_size
        # The furthest that a phase reads up and to the left.
        taps = (dy * (ky - 1) // sy, dx * (kx - 1) // sx)
        phases = weight.new_zeros(groups, sy, sx, outs, ins // groups, taps[0] + 1, taps[1] + 1)
        grouped = weight.view(groups, ins // groups, outs, ky, kx).transpose(1, 2)
        for y in range(ky):
            for x in range(kx):
                (up, a), (left, b) = divmod(y * dy, sy), divmod(x * dx, sx)
                phases[:, a, b, :, :, taps[0] - up, taps[1] - left] = grouped[..., y, x]
        bias = weight.new_zeros(groups * outs) if bias is None else bias
        spread = bias.view(groups, 1, 1, outs).expand(groups, sy, sx, outs).flatten()
        self.phases = SparseConv2d(
            phases.flatten(0, 3), spread, 1, taps, 1, groups, activation=activation
        )

    def _sizes(self, x: Tensor, output_size: Any) -> list[int]:
        """Height and width of the output."""
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        if output_size is None:
            return [n + more for n, more in zip(least, self.output_padding, strict=True)]
        sizes = list(output_size)[-2:]
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        if not all(a <= n <= b for a, n, b in zip(least, sizes, most, strict=True)):
            raise ValueError(
                f"output_size is {tuple(output_size)}, but for an input of shape {tuple(x.shape)} "
                f"it must lie between {tuple(least)} and {tuple(most)}"
            )
        return sizes

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        check_input(self, x)
        if x.dim() not in (3, 4):
            raise ValueError(
                "expected an input of 3 or 4 dimensions for a transposed convolution, found one of "
                f"shape {tuple(x.shape)}"
            )
        if x.dim() == 3:
            return self.forward(x[None], output_size).contiguous()[0]
        sizes, missing = self._sizes(x, output_size), []
        for n, size, s, p, reach in zip(
            x.shape[2:],
            sizes,
            self.stride,
            self.padding,
            self.phases.window.padding,
            strict=True,
        ):
            missing.append(max(0, -(-(size + p) // s) - (n + reach)))
        if any(missing):  # the output padding goes beyond what the input reaches
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        y = self.phases(x)
        if self.stride == (2, 2) and self.padding == (0, 0) and self.groups == 1:
            return self._interleaved(y, *sizes)
        (sy, sx), (py, px) = self.stride, self.padding
        batch, channels, rows, columns = y.shape
        outs = channels // (self.groups * sy * sx)
        wide = floats(batch, self.groups, outs, rows, sy, columns, sx)
        split = y.unflatten(1, (self.groups, sy, sx, outs))
        wide.copy_(split.permute(0, 1, 4, 5, 2, 6, 3))
        whole = wide.view(batch, self.groups * outs, rows * sy, columns * sx)
        return whole[:, :, py : py + sizes[0], px : px + sizes[1]].contiguous()

    def _interleaved(self, y: Tensor, height: int, width: int) -> Tensor:
        """The phases as a map of the whole output; what goes beyond its size is left out."""
        batch, channels, rows, columns = y.shape
        outs = channels // 4
        even = height % 2 == 0 and width % 2 == 0 and (2 * rows, 2 * columns) == (height, width)
        down, right = self.margin if even else (0, 0)
        output = padded(batch, outs, 2 * rows, 2 * columns, 2 * rows + down, 2 * columns + right)
        buffer = floats(output.size)
        for a in (0, 1):
            first, second = (y[:, (2 * a + b) * outs : (2 * a + b + 1) * outs] for b in (0, 1))
            interleave(first, second, output, buffer, a, clear=a == 0)
        if not even:
            whole = buffer.as_strided(output.shape, output.strides, output.lead)
            return whole[:, :, :height, :width].contiguous()
        return show(output, buffer, output.shape, output.strides, self)
