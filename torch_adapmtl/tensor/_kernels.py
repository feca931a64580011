"""Kernels that compute sparse weights; on a CPU, in pieces that stay in its cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Shrinkage",
    "batches",
    "drop_zeros_",
    "firm",
    "mask_",
    "masked",
    "masked_gradient",
    "rescaled",
    "shrink_",
    "slopes",
    "to_firm",
]

_PIECE = 2**17
# A weight is multiplied by less than 2, so that its difference to the sparse weight is exact; the
# distance to 2 is for rounding errors in bfloat16.
_MOST = 1.875
# How many numbers a GPU computes at once.
_BATCH = 2**24
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


def slopes(scale: float, alpha: float) -> tuple[float, float, float]:
    """The slopes of a soft threshold with a scale.

    The soft-thresholded weight is multiplied by the scale, but no weight by more than 15/8. With u
    the magnitude after the soft threshold, that is `far * u + extra * min(u, limit)`.

    Args:
        scale: The scale, at least 1.
        alpha: The threshold.

    Returns:
        `far`, `extra` and `limit`.
    """
    extra = max(scale - _MOST, 0.0)
    return min(scale, _MOST), extra, _MOST * alpha / extra if extra else 0.0


def rescaled(soft: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
    """What `slopes` says, for a threshold and a scale that the host does not know.

    Args:
        soft: The soft-thresholded weight.
        alpha: The threshold, 0-d; if it is zero, `soft` is returned as it is.
        scale: The scale, 0-d, at least 1.
    """
    scale = torch.where(alpha > 0, scale, 1.0)
    extra = (scale - _MOST).clamp(min=0.0)
    limit = _MOST * alpha / extra.clamp(min=1e-6)
    return scale.clamp(max=_MOST) * soft + extra * soft.clamp(-limit, limit)


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
    for part, kept in _pieces(tensor, mask):
        part.view(bits).mul_(kept.view(torch.uint8))


def drop_zeros_(gradient: Tensor, weight: Tensor) -> None:
    """Set the entries of a gradient where the weight is zero to zero, in place."""
    torch.ops.aten.softshrink_backward.grad_input(gradient, weight, 0.0, grad_input=gradient)


class Shrinkage(NamedTuple):
    """What `shrink_` does with one weight.

    Attributes:
        weight: The dense weight; becomes the sparse weight.
        residual: A tensor of the same shape; becomes their difference.
        alpha: The threshold.
        reach: See `soft_threshold`.
        mask: False where the sparse weight is zero; None for no mask.
        scale: See `slopes`; only with an infinite reach.
    """

    weight: Tensor
    residual: Tensor
    alpha: float
    reach: float
    mask: Tensor | None = None
    scale: float = 1.0


def batches(shrinkages: Mapping[int, Shrinkage]) -> Iterator[dict[int, Shrinkage]]:
    """Yield what `shrink_` does at once: weights of the same reach that are small together."""
    # A GPU would wait for the host to start a kernel for each small weight. The temporary copy of a
    # batch is limited; on a CPU it stays in the cache.
    batch: dict[int, Shrinkage] = {}
    size, reach = 0, 0.0
    for key, shrinkage in shrinkages.items():
        numel = shrinkage.weight.numel()
        limit = _PIECE if shrinkage.weight.device.type == "cpu" else _BATCH
        if batch and (size + numel > limit or shrinkage.reach != reach):
            yield batch
            batch, size = {}, 0
        batch[key] = shrinkage
        size, reach = size + numel, shrinkage.reach
    if batch:
        yield batch


def shrink_(batch: Sequence[Shrinkage]) -> None:
    """Replace dense weights by their sparse weights, and write the differences into `residual`.

    The sum of the two is the dense weight again, without any rounding error: the sparse weight is
    less than twice the dense weight, and either their difference is exact, or that of the dense
    weight and the residual is (Sterbenz).

    Args:
        batch: The weights, of the same reach.
    """
    if len(batch) > 1:
        _shrink(batch)
        return
    weight, residual, alpha, reach, mask, scale = batch[0]
    tensors = (weight, residual) if mask is None else (weight, residual, mask)
    for part, rest, *kept in _pieces(*tensors):
        _shrink([Shrinkage(part, rest, alpha, reach, kept[0] if kept else None, scale)])


def _shrink(group: Sequence[Shrinkage]) -> None:
    moved = []
    for shrinkage in group:
        if shrinkage.alpha == 0.0:
            shrinkage.residual.zero_()
        else:
            moved.append(shrinkage)
    if moved:
        alphas = [min(s.alpha, torch.finfo(s.weight.dtype).max) for s in moved]
        weights, residuals = [s.weight for s in moved], [s.residual for s in moved]
        for weight, residual, alpha in zip(weights, residuals, alphas, strict=True):
            torch.ops.aten.softshrink.out(weight, alpha, out=residual)
        reach = moved[0].reach
        if reach != math.inf:
            limits = [alpha * (reach - 1) for alpha in alphas]
            back = torch._foreach_clamp_max(residuals, limits)
            torch._foreach_clamp_min_(back, [-limit for limit in limits])
            torch._foreach_add_(residuals, back, alpha=1 / (reach - 1))
        elif any(s.scale != 1.0 for s in moved):
            found = [slopes(s.scale, alpha) for s, alpha in zip(moved, alphas, strict=True)]
            near = torch._foreach_clamp_max(residuals, [limit for _, _, limit in found])
            torch._foreach_clamp_min_(near, [-limit for _, _, limit in found])
            torch._foreach_mul_(near, [extra for _, extra, _ in found])
            torch._foreach_mul_(residuals, [far for far, _, _ in found])
            torch._foreach_add_(residuals, near)
        torch._foreach_sub_(residuals, weights)
        torch._foreach_neg_(residuals)
    masked = [(s.weight, s.residual, s.mask) for s in group if s.mask is not None]
    for weight, residual, mask in masked:
        torch.where(mask, residual, weight, out=residual)
    torch._foreach_sub_([s.weight for s in group], [s.residual for s in group])
    for weight, _, mask in masked:
        mask_(weight, mask)  # infinity minus infinity is NaN


def _pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut large tensors on a CPU into pieces that stay in its cache; others stay whole."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE or (flat := _flat(*tensors)) is None:
        return [tensors]
    return list(zip(*(tensor.split(_PIECE) for tensor in flat), strict=True))


def _flat(*tensors: Tensor) -> list[Tensor] | None:
    """Flat views of tensors in their common storage order; None if there is none."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    if tensors[0].ndim in (4, 5):
        moved = [tensor.movedim(1, -1) for tensor in tensors]  # channels last
        if all(tensor.is_contiguous() for tensor in moved):
            return [tensor.view(-1) for tensor in moved]
    return None
