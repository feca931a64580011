"""Modules between layers that read and write maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._call import (
    engine,
    fields,
    interleave,
    run,
)
from ._elementwise import image, mean, show_like
from ._layers import Activation, Plan, make_room
from ._maps import MOST_FLOATS, LeavesRoom, contiguous, floats, held, padded, show
from ._record import unrecorded
from ._windows import SparseConv2d, Window, pair


class Norm(NamedTuple):
    """What a batch norm computes with, one number for each channel."""

    mean: Tensor
    variance: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None


class MapNorm2d(nn.Module):
    """A batch norm and what follows it, on maps: a convolution of one weight for each channel.

    Args:
        norm: What the batch norm computes with.
        activation: What follows; None for nothing.
    """

    def __init__(self, norm: Norm, activation: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation
        scale = (norm.variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
        shift = (0.0 if norm.bias is None else norm.bias) - norm.mean * scale
        self.on_maps = SparseConv2d(
            scale[:, None, None, None], shift, groups=len(scale), activation=Activation(activation)
        )

    def forward(self, x: Tensor) -> Tensor:
        if held(x) is not None and x.dim() == 4:
            y: Tensor = self.on_maps(x)
            return y
        mean, variance, eps, weight, bias = self.norm
        y = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        return y if self.activation is None else self.activation(y)


class MapUpsample(LeavesRoom, nn.Module):
    """`torch.nn.functional.interpolate`, on maps where it doubles images by nearest neighbours.

    Args:
        module: The module whose settings it has; None if it is called with the settings.
    """

    def __init__(self, module: nn.Upsample | None = None) -> None:
        super().__init__()
        names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
        self.settings = {name: getattr(module, name) for name in names} if module else {}

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, settings = input, {**self.settings, **kwargs}
        if held(x) is None or x.dim() != 4 or not _doubles(x, *args, **settings):
            return F.interpolate(x, *args, **settings)
        batch, channels, height, width = x.shape
        rows, columns = 2 * height + self.margin[0], 2 * width + self.margin[1]
        output = padded(batch, channels, 2 * height, 2 * width, rows, columns)
        buffer = floats(output.size)
        for row in (0, 1):
            interleave(x, x, output, buffer, row, clear=row == 0)
        return show(output, buffer, output.shape, output.strides, self)


def _doubles(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> bool:
    """Whether the arguments of `interpolate` ask for twice the size by nearest neighbours."""
    if mode not in ("nearest", "nearest-exact") or antialias:
        return False
    if size is not None:
        return pair(size) == (2 * x.shape[2], 2 * x.shape[3])
    return scale_factor is not None and pair(scale_factor) == (2, 2)


class MapMaxPool2d(LeavesRoom, nn.Module):
    """Max pooling that writes maps, and reads maps or images.

    For one image in torch's default format, it is faster than torch's.

    Args:
        pool: What it computes; without `ceil_mode` and `return_indices`.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool
        self.window = Window(pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        height, width = self.window.kernel_size
        y, x = torch.ones(height, width, device="cpu").nonzero().unbind(1)
        self.phases, self.phase, self.down, self.right = self.window.phases(y, x)
        self.reach = int(self.down.max()), int(self.right.max())
        self._plans: dict[Any, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.dtype is not torch.float32 or not len(x):
            return self._by_torch(x)
        key = x.shape, self.margin
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(x)
            if plan is None:
                return self._by_torch(x)
            make_room(self._plans)
            self._plans[key] = plan
        source, output = plan.source, plan.output
        # Before the first phase and after the last one lie zeros, which no position of the output
        # that is kept reads.
        buffer = self.window.split(x, self.phases, source, float("-inf"))
        result = floats(output.size)
        run(plan.filled(buffer, result), plan)
        return show(output, result, output.shape, output.strides, self)

    @unrecorded
    def _plan(self, x: Tensor) -> Plan | None:
        """How images of a size are computed; None if torch does it."""
        batch, channels, height, width = x.shape
        out_h, out_w = self.window.output_size(height, width)
        if out_h < 1 or out_w < 1:
            return None  # torch's error
        down, right = self.reach
        rows, columns = out_h + max(down, self.margin[0]), out_w + max(right, self.margin[1])
        source = padded(
            batch,
            channels * len(self.phases),
            out_h + down,
            out_w + right,
            rows,
            columns,
            down * columns + right,
        )
        if source.size >= MOST_FLOATS:
            return None
        output = padded(batch, channels, out_h, out_w, rows, columns)
        offsets = self.phase * channels * source.pitch + self.down * columns + self.right
        offsets, keep, kernels = offsets.int(), output.keep, engine()
        call = fields(
            work=kernels.works["maximum"],
            parallel=kernels.parallel,
            lead_bytes=4 * output.lead,
            tail_bytes=4 * output.lead,
            pitch=output.pitch,
            x_channel=source.pitch,
            channels=channels,
            rows=len(offsets),
            nonzeros=offsets.data_ptr(),
            keep=0 if keep is None else keep.data_ptr(),
        )
        alive = [offsets] if keep is None else [offsets, keep]
        work = len(offsets) * channels * output.pitch
        return Plan(source, output, False, call, alive, work)

    def _by_torch(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(contiguous(x))
        return y


class MapActivation(nn.Module):
    """An elementwise module that maps 0 to 0."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        a = image(x)
        if a is None:
            y: Tensor = self.module(x)
            return y
        if getattr(self.module, "inplace", False):
            self.module(a.buffer)
            return x
        return show_like(a.layout, self.module(a.buffer), a)


class MapMean(nn.Module):
    """The mean over height and width, which stay as 1."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = mean(x, keepdim=True)
        return y
