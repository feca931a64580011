"""Layers that skip the zeros of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._call import LEAD, RESIDUAL, TAIL, THREADS, Fields, X, Y, run, threads, transpose_into
from ._filters import Filters
from ._kernels.activations import CLAMP, GELU, GELU_TANH, HARDSWISH, NONE, SILU
from ._maps import MOST_FLOATS, Held, Map, floats, held, show
from ._record import unrecorded

MOST_PLANS = 4  # sizes of inputs that a layer remembers


class Activation:
    """What follows a layer: in the kernel if it has code for it, otherwise by torch on the map.

    Args:
        module: An elementwise module that maps 0 to 0, such as ``nn.ReLU()``; None for none.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module
        self.kernel: tuple[int, float, float] = (NONE, 0.0, 0.0)
        self.after: Callable[[Tensor], Tensor] | None = None
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            self.kernel = (CLAMP, float(module.min_val), float(module.max_val))
        elif isinstance(module, nn.ReLU):
            self.kernel = (CLAMP, 0.0, float("inf"))
        elif isinstance(module, nn.Hardswish):
            self.kernel = (HARDSWISH, 0.0, 0.0)
        elif isinstance(module, nn.SiLU):
            self.kernel = (SILU, 0.0, 0.0)
        elif isinstance(module, nn.GELU):
            self.kernel = (GELU if module.approximate == "none" else GELU_TANH, 0.0, 0.0)
        elif module is not None:
            self.after = module


class Plan:
    """How a layer computes one size of input.

    Attributes:
        source: The layout that is read.
        output: The layout that is written.
        direct: Whether the input is such a map already.
        call: The fields of a call, without the addresses of inputs and outputs.
        alive: The tensors that the fields point to.
        work: Multiply-adds.
    """

    def __init__(
        self, source: Map, output: Map, direct: bool, call: Any, alive: list[Tensor], work: int
    ) -> None:
        self.source, self.output, self.direct = source, output, direct
        self.call, self.alive, self.work = call, alive, work

    def filled(self, source: Tensor, output: Tensor) -> Any:
        """The fields of a call that reads and writes the memory of two maps."""
        call, at, layout = Fields.from_buffer_copy(self.call), output.data_ptr(), self.output
        call[X], call[Y] = source.data_ptr() + 4 * self.source.lead, at + 4 * layout.lead
        call[LEAD], call[TAIL] = at, at + 4 * (layout.size - layout.lead)
        call[THREADS] = threads(self.work)
        return call


def make_room(plans: dict[Any, Plan]) -> None:
    """Forget the oldest plans of a layer."""
    while len(plans) >= MOST_PLANS:
        plans.pop(list(plans)[0], None)  # noqa: RUF015  other threads change it


class SparseLayer(nn.Module):
    """Filters applied at every position of a map, then a residual added and an activation."""

    def __init__(self, filters: Filters, activation: Activation) -> None:
        super().__init__()
        self.filters, self.activation = filters, activation
        self._plans: dict[Hashable, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    @property
    def outputs(self) -> int:
        """Number of output channels or features."""
        return len(self.filters.bias)

    @unrecorded
    def _plan(self, key: Hashable, source: Map, output: Map, direct: bool) -> Plan:
        if max(source.size, output.size) >= MOST_FLOATS:
            raise ValueError(
                f"an input of {source.positions:,} positions is too large for {self}: "
                "split the batch"
            )
        call, alive = self.filters.call(source, output, self.activation.kernel)
        plan = Plan(source, output, direct, call, alive, len(self.filters) * output.positions)
        make_room(self._plans)
        self._plans[key, torch.get_num_threads()] = plan
        return plan

    def _planned(self, key: Hashable) -> Plan | None:
        """The plan for inputs of a size, and for as many threads as torch has now."""
        return self._plans.get((key, torch.get_num_threads()))

    def _run(self, plan: Plan, source: Tensor, residual: Held | None = None) -> Tensor:
        """Compute the memory of the output map from that of the source map."""
        buffer = floats(plan.output.size)
        call = plan.filled(source, buffer)
        if residual is not None:
            call[RESIDUAL] = residual.address
        run(call, plan)
        return buffer if self.activation.after is None else self.activation.after(buffer)


def check_input(layer: nn.Module, x: Tensor) -> None:
    """Refuse what the kernels cannot compute."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        raise TypeError(
            f"{type(layer).__name__} computes float32 on a CPU, but its input is {x.dtype} on "
            f"{x.device}: convert the input, or call the model that accelerate() was given"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(layer).__name__} computes no gradients, but its input requires them: call the "
            "accelerated model under torch.no_grad()"
        )


def fits(other: Any, shape: Sequence[int]) -> bool:
    """Whether a float32 tensor of that shape stays what it is if `other` is added to it."""
    if not isinstance(other, Tensor) or other.dtype is not torch.float32:
        return False
    sizes = zip(reversed(other.shape), reversed(shape), strict=False)
    return other.dim() <= len(shape) and all(n in (1, most) for n, most in sizes)


class SparseLinear(SparseLayer):
    """A linear layer that skips the zeros of its weight; the rows of its input are positions.

    Args:
        weight: Shape ``(out, in)``.
        bias: One number for each output, or None.
        activation: What follows.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> None:
        row, column = weight.nonzero().unbind(1)
        nowhere = torch.zeros_like(row)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        filters = Filters(row, column, nowhere, nowhere, weight[row, column], bias, weight.shape[1])
        super().__init__(filters, activation or Activation())
        self.keeps_map = False  # shows the output as it is, for a layer that reads it so

    def extra_repr(self) -> str:
        return f"{self.filters.columns}, {self.outputs}, nonzeros={len(self.filters)}"

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x)
        *leading, inputs = x.shape or (0,)
        if inputs != self.filters.columns:
            raise ValueError(
                f"expected {self.filters.columns} features, got an input of shape {tuple(x.shape)}"
            )
        positions = math.prod(leading)
        if not (positions and inputs and self.outputs):
            return self._without_inputs(leading)
        plan = self._planned(positions)
        if plan is None:
            source, output = (Map(1, n, 1, positions, 1, positions) for n in (inputs, self.outputs))
            plan = self._plan(positions, source, output, True)
        found = held(x)
        if found is not None and found.layout == plan.source:
            buffer = found.buffer
        else:
            buffer = floats(plan.source.size)
            transpose_into(x.reshape(positions, inputs), buffer, plan.source.pitch)
        buffer = self._run(plan, buffer)
        pitch = plan.output.pitch
        if self.keeps_map:
            shape = (*leading, self.outputs)
            return show(plan.output, buffer, shape, _strides(leading, pitch), None)
        y = floats(positions, self.outputs)
        transpose_into(buffer.view(self.outputs, pitch)[:, :positions], y, self.outputs)
        return y.view(*leading, self.outputs)

    def _without_inputs(self, leading: Sequence[int]) -> Tensor:
        """The activation of the bias."""
        y = self.filters.bias.repeat(*leading, 1)
        return y if self.activation.module is None else self.activation.module(y)


def _strides(leading: Sequence[int], pitch: int) -> tuple[int, ...]:
    """Strides of a tensor ``(*leading, features)`` that a map of its tokens shows."""
    strides, step = [pitch], 1
    for n in reversed(leading):
        strides.insert(0, step)
        step *= n
    return (*strides,)
