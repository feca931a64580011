"""The soft threshold on a weight: `soft_threshold` and the parametrization `SoftThreshold`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl._checks import (
    check_alpha,
    check_boolean,
    check_mask,
    check_place,
    check_reach,
    check_threshold,
    obstacle,
)
from torch_adapmtl.tensor._kernels import firm, masked, masked_gradient, rescaled, to_firm

__all__ = ["SoftThreshold", "soft_threshold"]


class _SoftThreshold(torch.autograd.Function):
    """`S(w, alpha)`; saves at most the parameter and alpha for the backward pass.

    `value` is alpha as a Python number, or None if it is not known on the host. If it is known, the
    weight is read once and the result written once, which takes as long as a copy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, alpha: Tensor, value: float | None, reach: float, straight_through: bool
    ) -> Tensor:
        if value == 0.0:
            return weight.clone()  # softshrink does not always keep the sign of a zero
        if value is not None and reach != math.inf:
            return firm(weight, value, reach)
        if value is not None:
            return F.softshrink(weight, min(value, torch.finfo(weight.dtype).max))
        # A threshold that is trained can become negative.
        alpha = alpha.to(weight.dtype).clamp(min=0)
        if torch.onnx.is_in_onnx_export():  # ONNX has no operation for the sign of a zero
            soft = weight - weight.clamp(-alpha, alpha)
            return soft if reach == math.inf else to_firm(reach, soft, alpha)
        # Unlike `sign(w) * relu(|w| - alpha)`, this keeps NaN, infinity and the sign of a zero, and
        # allocates one tensor only.
        soft = weight.clamp(-alpha, alpha).sub_(weight).copysign_(weight)
        return soft if reach == math.inf else to_firm(reach, soft, alpha).copysign_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, alpha, value, _, straight_through = inputs
        ctx.straight_through = straight_through
        ctx.value = None if alpha.requires_grad else value
        if ctx.value is None and (not straight_through or alpha.requires_grad):
            ctx.save_for_backward(weight, alpha)
        elif not straight_through:  # not alpha, which an update may change before the backward pass
            ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_weight, needs_alpha = ctx.needs_input_grad[:2]
        grad_weight = grad if needs_weight else None
        grad_alpha = None
        if not ctx.straight_through and ctx.value is not None:
            grad_weight = masked_gradient(grad, ctx.saved_tensors[0], ctx.value)
        elif not ctx.straight_through or needs_alpha:
            weight, alpha = ctx.saved_tensors
            magnitude = weight.abs()
            threshold = alpha.to(weight.dtype)
            if needs_weight and not ctx.straight_through:
                # `>=`, so that a zero weight is trained while the threshold is zero.
                grad_weight = grad.masked_fill(magnitude < threshold, 0)
            if needs_alpha:
                kept = (grad * weight.sign()).masked_fill(magnitude <= threshold, 0)
                grad_alpha = -kept.sum_to_size(alpha.shape).to(alpha.dtype)
        return grad_weight, grad_alpha, None, None, None


def _mask(weight: Tensor, mask: Tensor) -> Tensor:
    kept: Tensor = _Mask.apply(weight, mask)
    return kept


class _Mask(torch.autograd.Function):
    """Apply a boolean mask to a tensor, and to its gradient in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return masked(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Mask.apply(grad, *ctx.saved_tensors), None


class _Rescale(torch.autograd.Function):
    """Apply a scale that the gradient takes for 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(soft: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
        return rescaled(soft, alpha.to(soft.dtype), scale.to(soft.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def soft_threshold(
    weight: Tensor,
    alpha: Tensor | float,
    *,
    reach: float = math.inf,
    straight_through: bool = False,
) -> Tensor:
    r"""Soft thresholding, \(S(w, \alpha) = \mathrm{sign}(w)\,\mathrm{relu}(|w| - \alpha)\), AdapMTL's pruning operator.

    The gradients are \(\partial S/\partial w = 1[|w| \ge \alpha]\) and
    \(\partial S/\partial \alpha = -\mathrm{sign}(w)\,1[|w| > \alpha]\). The paper (arXiv 2408.03913) has
    \(>\) in both; here the first includes equality, so that zero-initialised weights are trained while
    the threshold is zero. With `straight_through=True` the gradient with respect to the weight is
    passed on for *every* entry, so that a pruned weight is still trained and can become nonzero again.

    With a finite `reach` the shrinkage decreases for weights above \(\alpha\) and is zero from `reach`
    times \(\alpha\) on (up to rounding), so that large weights are not biased. This is firm thresholding
    (Gao and Bruce, 1997): with \(r\) the reach, the result is \(S(w, \alpha)\,r / (r - 1)\) in between.
    The gradients are the same as above.

    A threshold of zero is the identity. NaN and infinite weights are returned unchanged. The backward
    pass needs `weight` and `alpha` only; with `straight_through=True` it needs nothing, unless `alpha`
    is trained.

    Args:
        weight: Any shape; float16, bfloat16, float32 or float64.
        alpha: The threshold, not negative, in units of the weight: a number, or a tensor that
            broadcasts to the weight's shape (it is rounded to the weight's dtype). The sign of a
            tensor is not checked, because that would synchronise with the device. A negative entry
            counts as zero, with the gradient of a threshold just above zero, so that it can rise again.
        reach: Magnitude at which the shrinkage ends, in units of alpha; > 1. Infinite, as in the
            paper, by default.
        straight_through: Whether to pass the gradient on to pruned weights too.

    Returns:
        The sparse weight, in the weight's shape and dtype.

    Raises:
        ValueError: If a numeric `alpha` is negative or not finite, a tensor is on another device
            than the weight or its shape does not broadcast to the weight's, or `reach` is not above 1.
        TypeError: If `weight` is not a dense tensor of one of these dtypes, or `alpha` or `reach` is
            not a real number.

    Example:
        >>> import torch
        >>> from torch_adapmtl import soft_threshold
        >>> soft_threshold(torch.tensor([-1.0, 0.25, 0.0, 0.75]), 0.5)
        tensor([-0.5000,  0.0000,  0.0000,  0.2500])
    """  # noqa: E501
    check_reach(reach)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if problem := obstacle(weight):
        raise TypeError(f"weight {problem}")
    if isinstance(alpha, Tensor):
        check_alpha(alpha, weight)
        return _apply(weight, alpha, None, reach, straight_through)
    value = min(check_threshold("alpha", alpha), torch.finfo(weight.dtype).max)
    alpha = torch.full((), value, dtype=weight.dtype, device=weight.device)
    known = None if torch.compiler.is_compiling() else _round_to(value, weight.dtype)
    return _apply(weight, alpha, known, reach, straight_through)


def _elsewhere(weight: Tensor) -> bool:
    """Whether torch.compile, torch.func or autocast is active; then `requires_grad` stays unset.

    Autocast would keep a copy of every tensor that requires grad.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_autocast_enabled(weight.device.type)
    )


def _apply(
    weight: Tensor, alpha: Tensor, value: float | None, reach: float, straight_through: bool
) -> Tensor:
    if torch.compiler.is_compiling():
        value = None  # a number would be a constant of the graph, but the threshold changes
    sparse: Tensor = _SoftThreshold.apply(weight, alpha, value, reach, straight_through)
    return sparse


def _round_to(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(min(value, torch.finfo(dtype).max), dtype=dtype).item()


class SoftThreshold(nn.Module):
    """Parametrization that applies the soft threshold to a weight (AdapMTL, Section 3).

    Register it with `torch.nn.utils.parametrize.register_parametrization`, or let
    [`soft_threshold_unstructured`][torch_adapmtl.soft_threshold_unstructured] or
    [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] do it.

    Args:
        threshold: The threshold alpha: a number, or an `nn.Parameter` with one element, which is
            then trained with the weights. If training makes it negative, it acts as zero.
        reach: See [`soft_threshold`][torch_adapmtl.soft_threshold].
        straight_through: See [`soft_threshold`][torch_adapmtl.soft_threshold].
        mask: Boolean tensor in the weight's shape. Entries where it is False are zero,
            independently of the threshold, and receive no gradient.
        persistent: Whether the threshold and the mask are part of the `state_dict`. They are not
            in a model that `apply_adapmtl` prepared, where the pruner saves them.

    Attributes:
        alpha: The threshold, a tensor with one element. Change it by `set_threshold` or in place,
            but not through `alpha.data`: such a write is not noticed.
        mask: The mask, or None.

    Raises:
        ValueError: If `threshold` is negative, not finite, or a tensor of several elements, or
            `reach` is not above 1. In the forward pass, if the threshold or the mask is on another
            device than the weight, or the mask is of another shape.
        TypeError: If `threshold` or `reach` is not a real number, or the mask is not boolean.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from torch_adapmtl import SoftThreshold
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> _ = parametrize.register_parametrization(
        ...     layer, "weight", SoftThreshold(0.25)
        ... )
        >>> layer(torch.ones(1, 2))
        tensor([[1.5000]], grad_fn=<MmBackward0>)
    """

    alpha: Tensor
    mask: Tensor | None
    # A mask of torch.nn.utils.prune that the tensor had before; it is restored at the end.
    earlier_mask: Tensor | None = None
    # In a run, which weights get a gradient until the zeros are fixed, if not those of `mask`.
    gradient_mask: Tensor | None = None
    # In a run, what a soft-thresholded weight is multiplied by: as a number, and 0-d.
    scale: float = 1.0
    _scale: Tensor | None = None

    def __init__(
        self,
        threshold: float | nn.Parameter = 0.0,
        *,
        reach: float = math.inf,
        straight_through: bool = False,
        mask: Tensor | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        check_reach(reach)
        self.reach = reach
        self.straight_through = straight_through
        # alpha as a Python number, with the tensor and the version of it that the number was read
        # from: reading it again would synchronise with the device.
        self._known: tuple[Tensor, int, float] | None = None
        check_boolean("mask", mask)
        if isinstance(threshold, Tensor):
            if not threshold.is_floating_point():
                raise TypeError(
                    f"threshold must be floating point, got a tensor of {threshold.dtype}; cast "
                    f"it to the weight's dtype"
                )
            if threshold.numel() != 1:
                raise ValueError(
                    f"threshold must hold one number, got a tensor of shape "
                    f"{tuple(threshold.shape)}; register one SoftThreshold a tensor"
                )
            if not threshold.is_meta:
                check_threshold("threshold", threshold.item())
        if isinstance(threshold, nn.Parameter):
            self.alpha = threshold
        else:
            self.register_buffer("alpha", torch.zeros(()), persistent=persistent)
            self.set_threshold(threshold)
        if persistent:
            self.register_buffer("mask", mask)
        else:
            # Not a buffer: an average of the model (torch.optim.swa_utils) pairs buffers by their
            # position, which would change if a mask were added during a run.
            self.mask = mask

    @torch.no_grad()
    def set_threshold(self, value: float) -> None:
        """Set alpha to `value`, without waiting for the device.

        Raises:
            ValueError: If `value` is negative or not finite.
        """
        value = _round_to(check_threshold("threshold", value), self.alpha.dtype)
        self.alpha.fill_(value)
        self._remember(value)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set what the soft-thresholded weight is multiplied by, without waiting for the device.

        [`Adaptive`][torch_adapmtl.Adaptive] does this in a run. No weight is multiplied by more
        than 15/8. The gradient passes as if nothing was multiplied. The scale is not part of the
        `state_dict`.

        Args:
            scale: At least 1, without unit; of no effect while alpha is zero.

        Raises:
            ValueError: If `scale` is below 1 or not finite, or `reach` is finite.
        """
        if not 1.0 <= scale < math.inf or self.reach != math.inf:
            raise ValueError(
                f"scale must be at least 1 and finite, and needs reach=math.inf; got "
                f"scale={scale!r} with reach={self.reach:g}"
            )
        self.scale = scale
        if self._scale is None:
            self._scale = torch.ones((), device=self.alpha.device)
        self._scale.fill_(scale)

    def threshold(self) -> Tensor:
        """Return the threshold that `forward` applies, differentiable if it is trained."""
        return self.alpha

    @property
    def trained(self) -> bool:
        """Whether the weight has to be computed in the forward pass, by a parametrization.

        That is so if the threshold is trained, or computed from something else that is, or if the
        sparse weight is another function of it.
        """
        kind = type(self)
        changed = any(
            getattr(kind, name) is not getattr(SoftThreshold, name)
            for name in ("threshold", "forward", "_shrink")
        )
        return changed or isinstance(self.alpha, nn.Parameter)

    def known(self) -> float:
        """Return alpha as a number; waits for the device only if alpha was written to elsewhere."""
        if (value := SoftThreshold._value(self)) is None:
            value = float(self.alpha)
            self._remember(value)
        return value

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sparse weight, in the shape and dtype of `weight`."""
        value = self._value()
        sparse = weight
        if value != 0.0 or self.alpha.requires_grad:
            alpha = self.threshold()
            check_place(alpha, weight)
            sparse = self._shrink(weight, alpha, value)
            if self._scale is not None:
                sparse = _Rescale.apply(sparse, alpha.detach(), self._scale)
        if self.mask is not None:
            check_mask(self.mask, weight)
            sparse = _mask(sparse, self.mask)
        if weight.requires_grad and not sparse.requires_grad and not _elsewhere(weight):
            # Under `no_grad`. Torch selects kernels by `requires_grad`, and their results differ in
            # the last bits; match the plain parameter, so that outputs stay bit-identical after
            # `finalize()`.
            sparse.requires_grad_()
        return sparse

    def _shrink(self, weight: Tensor, alpha: Tensor, value: float | None) -> Tensor:
        """Return the weight that remains, before the mask; not called if alpha is known to be zero.

        A subclass that overrides it gives the model another function of the weight and the
        threshold. What it takes away cannot be added again without a rounding error, so that its
        layers have a parametrization (see `trained`).

        Args:
            weight: The dense weight.
            alpha: The threshold.
            value: The threshold as a number, or None if it is not known on the host.
        """
        return _apply(weight, alpha, value, self.reach, self.straight_through)

    def _value(self) -> float | None:
        if torch.compiler.is_compiling() or self._known is None or self.alpha.is_inference():
            return None
        alpha, version, value = self._known
        # The number is invalid if alpha has been written to or replaced since.
        return value if alpha is self.alpha and alpha._version == version else None

    def _remember(self, value: float | None) -> None:
        # An inference tensor has no version by which a later write could be noticed.
        self._known = None
        if value is not None and not self.alpha.is_inference():
            self._known = (self.alpha, self.alpha._version, value)

    def _apply(self, fn: Any, recurse: bool = True) -> SoftThreshold:
        # Moving to another device or dtype replaces or rewrites alpha, so set the number again.
        value = SoftThreshold._value(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mask is not None and "mask" not in self._buffers:
            self.mask = fn(self.mask)
        if self.gradient_mask is not None:
            self.gradient_mask = fn(self.gradient_mask)
        if self._scale is not None:
            self._scale = fn(self._scale)
        if value is not None and not self.alpha.is_meta:
            self.set_threshold(value)  # also written, because `to_empty` leaves alpha uninitialised
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "alpha" in state_dict:
            self._known = None  # torch may have replaced alpha by a tensor with the same version

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor has another version, so store the number alone.
        return {**self.__dict__, "_known": SoftThreshold._value(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        value: Any = self._known
        self._remember(value)

    def extra_repr(self) -> str:
        """Show the options that differ from the defaults."""
        parts = [f"reach={self.reach:g}"] if self.reach != math.inf else []
        parts += ["straight_through=True"] if self.straight_through else []
        return ", ".join(parts + (["masked"] if self.mask is not None else []))
