"""Sparse weights that another function than the soft threshold computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["PowerThreshold", "RescaledThreshold", "power", "rescaled"]

# Added to both mean magnitudes of a channel, as in the authors' code of ST-3.
_SMALL = 1e-6


def rescaled(weight: Tensor, alpha: Tensor) -> Tensor:
    """The soft threshold, with each output channel multiplied by what makes up for its loss (ST-3).

    The factor is `1.01 / (r + 0.01)`. With m the mean magnitude of all weights of the channel, and
    k the same with the pruned weights counted as zeros, `r = (k + 1e-6) / (m + 1e-6)`.

    Args:
        weight: The dense weight, with the channels in its first dimension.
        alpha: The threshold, 0-d.
    """
    alpha = alpha.to(weight.dtype)
    magnitude = weight.abs().reshape(len(weight), -1)
    wide = torch.promote_types(weight.dtype, torch.float32)  # float16 sums overflow
    every = magnitude.mean(1, dtype=wide)
    kept = magnitude.masked_fill(magnitude <= alpha, 0).mean(1, dtype=wide)
    factor = 1.01 / ((kept + _SMALL) / (every + _SMALL) + 0.01)
    soft = weight - weight.clamp(-alpha, alpha)
    return soft * factor.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))


def power(weight: Tensor, alpha: Tensor, exponent: float) -> Tensor:
    """Thresholding between soft and hard: `sign(w) (|w|^p - alpha^p)^(1/p)` above alpha (Feather).

    Args:
        weight: The dense weight.
        alpha: The threshold, 0-d.
        exponent: p; 1 is the soft threshold, and a large p nearly a hard one.
    """
    alpha = alpha.to(weight.dtype)
    magnitude = weight.abs()
    wide = magnitude.to(torch.promote_types(weight.dtype, torch.float32))
    # |w| (1 - (alpha / |w|)^p)^(1/p), in which no power of a small weight becomes zero.
    shrunk = wide * (1 - (alpha / wide) ** exponent) ** (1 / exponent)
    return shrunk.to(weight.dtype).copysign(weight).masked_fill(magnitude <= alpha, 0)


class _Rescaled(torch.autograd.Function):
    """`rescaled`; the whole gradient passes to all weights, and the factor has no part in it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor) -> Tensor:
        return rescaled(weight, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Power(torch.autograd.Function):
    """`power`; the gradient passes whole to kept weights, and times theta to pruned ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor, exponent: float, theta: float) -> Tensor:
        return power(weight, alpha, exponent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.theta = inputs[3]
        if ctx.theta != 1.0:  # not alpha, which an update may change before the backward pass
            ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.theta != 1.0:
            (sparse,) = ctx.saved_tensors
            grad = torch.where(sparse == 0, grad * ctx.theta, grad)
        return grad, None, None, None


class RescaledThreshold(SoftThreshold):
    """Parametrization that applies `rescaled`; the gradient passes straight through."""

    def _shrink(self, weight: Tensor, alpha: Tensor, value: float | None) -> Tensor:
        sparse: Tensor = _Rescaled.apply(weight, alpha)
        return sparse


class PowerThreshold(SoftThreshold):
    """Parametrization that applies `power`.

    Args:
        exponent: p.
        theta: Factor of the gradients of pruned weights.
        **options: Options of `SoftThreshold`.
    """

    def __init__(self, exponent: float, theta: float, **options: Any) -> None:
        super().__init__(0.0, **options)
        self.exponent, self.theta = exponent, theta

    def _shrink(self, weight: Tensor, alpha: Tensor, value: float | None) -> Tensor:
        sparse: Tensor = _Power.apply(weight, alpha, self.exponent, self.theta)
        return sparse
