"""A layer with what follows it, dense or sparse."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._call import clock
from ._layers import Activation, SparseLinear, fits
from ._maps import contiguous
from ._record import STATE
from ._transposed import SparseConvTranspose2d
from ._windows import SparseConv2d


class FusedLayer(nn.Module):
    """A layer of the model and what follows it: as torch computes it, or skipping its zeros.

    Args:
        dense: The convolution or linear layer, with the batch norm folded in.
        name: The name of the layer in the model.
        activation: What follows; None for nothing.
    """

    def __init__(self, dense: nn.Module, name: str, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.name, self.kind = name, type(dense).__name__
        weight: Any = dense.weight
        self.dense: Any = dense
        self.activation = activation
        self.sparse: nn.Module | None = None
        self.choice = "dense"
        self.weights = int(weight.numel())
        self.nonzeros = int(weight.count_nonzero())
        self.positions = 0  # how often each weight is used, noted with the times
        self.outputs = int(getattr(dense, "out_channels", getattr(dense, "out_features", 0)))
        self.in_graph = False  # only called by graphs, which know that its output may be a map
        self.is_read = False  # the model's code reads attributes of the layer, such as its weight
        self.seconds: list[float] | None = None  # where the time of each call is noted

    @property
    def zeros(self) -> float:
        """Fraction of the weights that are zero."""
        return 1 - self.nonzeros / max(1, self.weights)

    def make_sparse(self) -> None:
        """Make the layer that skips zeros."""
        d, activation = self.dense, Activation(self.activation)
        weight, bias = d.weight.detach(), None if d.bias is None else d.bias.detach()
        if isinstance(d, nn.Linear):
            self.sparse = SparseLinear(weight, bias, activation)
        elif isinstance(d, nn.ConvTranspose2d):
            self.sparse = SparseConvTranspose2d(
                weight,
                bias,
                d.stride,
                d.padding,
                d.output_padding,
                d.groups,
                d.dilation,
                activation,
            )
        else:
            stride, padding, dilation, flat = d.stride, d.padding, d.dilation, False
            if isinstance(d, nn.Conv1d):
                weight, stride, dilation, flat = (
                    weight[:, :, None],
                    (1, *stride),
                    (1, *dilation),
                    True,
                )
                padding = padding if isinstance(padding, str) else (0, *padding)
            self.sparse = SparseConv2d(
                weight, bias, stride, padding, dilation, d.groups, d.padding_mode, activation, flat
            )

    def settle(self) -> None:
        """Keep only what was chosen."""
        if self.choice == "dense":
            self.sparse = None
        elif not self.is_read:
            self.dense = None

    def __getattr__(self, name: str) -> Any:
        """What the model's code may read of its layer, such as the weight or its dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            dense = self.__dict__.get("_modules", {}).get("dense")
            if dense is None:
                raise
            value = getattr(dense, name)
            self.is_read = True
            return value

    def forward(self, input: Tensor, other: Any = None, *, output_size: Any = None) -> Tensor:
        """Compute the output.

        Args:
            input: As torch calls it.
            other: The residual; of a transposed convolution, `output_size`, as in torch.
            output_size: As for :class:`torch.nn.ConvTranspose2d`.
        """
        other = output_size if other is None else other
        if STATE.recording is not None:
            with STATE.recording.layer(self.name):
                return self._compute(input, other)
        if self.seconds is None:
            return self._compute(input, other)
        begin = clock()
        y = self._compute(input, other)
        self.seconds.append(clock() - begin)
        transposed = isinstance(self.dense, nn.ConvTranspose2d)
        counted, channels = (input, self.dense.in_channels) if transposed else (y, self.outputs)
        self.positions = counted.numel() // max(1, channels)
        return y

    def _compute(self, x: Tensor, other: Any) -> Tensor:
        if self.choice == "sparse":
            assert self.sparse is not None
            y: Tensor = self.sparse(x) if other is None else self.sparse(x, other)
            return y if self.in_graph else contiguous(y)
        if isinstance(self.dense, nn.ConvTranspose2d):
            y, other = self.dense(x, other), None
        else:
            y = self._dense(x)
        if other is not None:
            y = y.add_(other) if fits(other, y.shape) else y + other
        return y if self.activation is None else self.activation(y)

    def _dense(self, x: Tensor) -> Tensor:
        d = self.dense
        one = isinstance(d, nn.Conv2d) and x.shape[2:] == d.weight.shape[2:] == (1, 1)
        if one and d.groups == 1 and d.padding == (0, 0):
            # A squeeze-and-excitation layer: torch's convolution is slower on one pixel.
            return F.linear(x[..., 0, 0], d.weight[..., 0, 0], d.bias)[..., None, None]
        y: Tensor = d(x)
        return y
