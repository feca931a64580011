"""Kernels that compute sparse weights; on a CPU, in pieces that stay in its cache."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["drop_zeros_", "firm", "mask_", "masked", "masked_gradient", "shrink_", "to_firm"]

_PIECE = 2**17
# The integers of the size of a floating-point number, in bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _whole(weight: Tensor) -> bool:
    """Whether to compute a weight at once instead of in pieces."""
    # Pieces stay in a core's cache, so that memory is read once and written once.
    return (
        weight.device.type != "cpu"
        or weight.numel() <= _PIECE
        or not weight.is_contiguous()
        or torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )


def to_firm(reach: float, soft: Tensor, alpha: Any) -> Tensor:
    """Turn soft into firm thresholding in place.

    Add back `alpha` beyond `reach * alpha`, and proportionally less below it.
    """
    limit = alpha * (reach - 1)
    return soft.add_(soft.clamp(-limit, limit), alpha=1 / (reach - 1))


def firm(weight: Tensor, alpha: float, reach: float) -> Tensor:
    """Apply the firm threshold, whose value is known on the host, to a weight."""
    alpha = min(alpha, torch.finfo(weight.dtype).max)
    if _whole(weight):
        return to_firm(reach, F.softshrink(weight, alpha), alpha)
    out, scratch = torch.empty_like(weight), weight.new_empty(_PIECE)
    limit = alpha * (reach - 1)
    for part, place in zip(weight.view(-1).split(_PIECE), out.view(-1).split(_PIECE), strict=True):
        torch.ops.aten.softshrink.out(part, alpha, out=place)
        back = torch.clamp(place, -limit, limit, out=scratch[: len(part)])
        place.add_(back, alpha=1 / (reach - 1))
    return out


def masked_gradient(grad: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The gradient where the magnitude of the weight is at least the threshold, zero elsewhere."""
    if alpha == 0.0:
        return grad
    # This kernel passes the gradient where the magnitude is above its threshold. Here the threshold
    # is included, so use the largest number below it.
    kept: Tensor = torch.ops.aten.softshrink_backward(grad, weight, _below(alpha, weight.dtype))
    return kept


def _below(number: float, dtype: torch.dtype) -> float:
    """The largest number of the dtype below a positive number of it."""
    info = torch.finfo(dtype)
    fraction, exponent = math.frexp(number)
    # Just below a power of two, the spacing of the numbers is half as large.
    spacing = math.ldexp(info.eps, exponent - (1 if fraction > 0.5 else 2))
    return number - max(spacing, info.smallest_normal * info.eps)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The entries where a boolean mask is True, zero elsewhere."""
    if torch.compiler.is_compiling() or _whole(weight) or not mask.is_contiguous():
        return torch.where(mask, weight, weight.new_zeros(()))  # not 0.0: torch would copy it
    # On a CPU `where` takes three times as long as this. The bits are multiplied as whole numbers,
    # so that all zeros are +0.0, and what is masked may be infinite or NaN.
    out, bits = torch.empty_like(weight), _BITS[weight.element_size()]
    flat = (weight.view(-1).view(bits), mask.view(-1).view(torch.uint8), out.view(-1).view(bits))
    for part, keep, place in zip(*(tensor.split(_PIECE) for tensor in flat), strict=True):
        torch.mul(part, keep, out=place)
    return out


def mask_(tensor: Tensor, mask: Tensor) -> None:
    """Set the entries where a boolean mask is False to +0.0, in place."""
    # As in `masked`: whole numbers, so that zeros are +0.0 whatever is masked.
    bits = _BITS[tensor.element_size()]
    if tensor.device.type != "cpu":
        tensor.masked_fill_(mask.logical_not(), 0.0)
        return
    if tensor.numel() <= _PIECE or (flat := _flat(tensor, mask)) is None:
        tensor.view(bits).mul_(mask.view(torch.uint8))
        return
    parts = flat[0].view(bits).split(_PIECE)
    for part, kept in zip(parts, flat[1].view(torch.uint8).split(_PIECE), strict=True):
        part.mul_(kept)


def drop_zeros_(gradient: Tensor, weight: Tensor) -> None:
    """Set the entries of a gradient where the weight is zero to zero, in place."""
    torch.ops.aten.softshrink_backward.grad_input(gradient, weight, 0.0, grad_input=gradient)


def shrink_(
    weight: Tensor, residual: Tensor, alpha: float, reach: float, mask: Tensor | None
) -> None:
    """Replace a dense weight by its sparse weight, and write the difference into `residual`.

    The sum of the two is the dense weight again, without any rounding error: the sparse weight is
    the weight minus the residual, and the residual is so large or so small that this difference or
    the one before it is exact (Sterbenz).

    Args:
        weight: The dense weight; changed in place.
        residual: A tensor of the same shape; overwritten.
        alpha: The threshold.
        reach: See `soft_threshold`.
        mask: False where the sparse weight is zero; None for no mask.
    """
    alpha = min(alpha, torch.finfo(weight.dtype).max)
    tensors = (weight, residual) if mask is None else (weight, residual, mask)
    if weight.device.type != "cpu" or weight.numel() <= _PIECE or (flat := _flat(*tensors)) is None:
        _shrink(weight, residual, alpha, reach, mask)
        return
    for part, rest, *kept in zip(*(tensor.split(_PIECE) for tensor in flat), strict=True):
        _shrink(part, rest, alpha, reach, kept[0] if kept else None)


def _shrink(
    weight: Tensor, residual: Tensor, alpha: float, reach: float, mask: Tensor | None
) -> None:
    if alpha == 0.0:
        residual.zero_()
    else:
        sparse = F.softshrink(weight, alpha)
        if reach != math.inf:
            limit = alpha * (reach - 1)
            sparse.add_(torch.clamp(sparse, -limit, limit, out=residual), alpha=1 / (reach - 1))
        torch.sub(weight, sparse, out=residual)
    if mask is not None:
        torch.where(mask, residual, weight, out=residual)
    weight.sub_(residual)
    if mask is not None:
        mask_(weight, mask)  # infinity minus infinity is NaN


def _flat(*tensors: Tensor) -> list[Tensor] | None:
    """Flat views of tensors in their common storage order; None if there is none."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    if tensors[0].ndim in (4, 5):
        moved = [tensor.movedim(1, -1) for tensor in tensors]  # channels last
        if all(tensor.is_contiguous() for tensor in moved):
            return [tensor.view(-1) for tensor in moved]
    return None
