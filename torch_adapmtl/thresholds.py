"""Soft thresholds on weights, as a function, a parametrization and a `torch.nn.utils.prune` method.

Everything here runs on one engine: the autograd function behind `soft_threshold`.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ._attach import attach, detach

__all__ = ["SoftThreshold", "SoftThresholdPruning", "soft_threshold", "soft_threshold_unstructured"]


class _SoftThreshold(torch.autograd.Function):
    """`S(w, alpha)`; saves the parameter and alpha for the backward, or nothing at all.

    `value` is alpha as a Python number where the caller knows it: then one kernel reads the weight
    once and writes the result once, which is what copying it would cost.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        weight: Tensor, alpha: Tensor, value: float | None, straight_through: bool
    ) -> Tensor:
        if value is not None:
            return F.softshrink(weight, value)
        alpha = alpha.to(weight.dtype)
        # Not `sign(w) * relu(|w| - alpha)`: this form keeps NaN and infinity and reads less.
        return weight - weight.clamp(-alpha, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, alpha, _, straight_through = inputs
        ctx.straight_through = straight_through
        if not straight_through or alpha.requires_grad:
            ctx.save_for_backward(weight, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_weight, needs_alpha = ctx.needs_input_grad[:2]
        grad_weight = grad if needs_weight else None
        grad_alpha = None
        if not ctx.straight_through or needs_alpha:
            weight, alpha = ctx.saved_tensors
            magnitude = weight.abs()
            threshold = alpha.to(weight.dtype)
            if needs_weight and not ctx.straight_through:
                # On `>=`, so that a zero weight under a zero threshold still learns.
                grad_weight = grad.masked_fill(magnitude < threshold, 0)
            if needs_alpha:
                kept = (grad * weight.sign()).masked_fill(magnitude <= threshold, 0)
                grad_alpha = -kept.sum_to_size(alpha.shape).to(alpha.dtype)
        return grad_weight, grad_alpha, None, None


def soft_threshold(
    weight: Tensor, alpha: Tensor | float, *, straight_through: bool = False
) -> Tensor:
    r"""Soft thresholding, \(S(w, \alpha) = \mathrm{sign}(w)\,\mathrm{relu}(|w| - \alpha)\), AdapMTL's pruning operator.

    The gradients are the paper's (arXiv 2408.03913): \(\partial S/\partial w = 1[|w| \ge \alpha]\) and
    \(\partial S/\partial \alpha = -\mathrm{sign}(w)\,1[|w| > \alpha]\). The first includes the kink, so
    that zero-initialised weights learn while the threshold is zero. With `straight_through=True` the
    gradient with respect to the weight is passed on for *every* entry, so that a pruned weight keeps
    learning and can return; the paper's mask gradient leaves it where it fell.

    A threshold of zero is the identity. NaN and infinite weights pass through. The backward keeps
    `weight` and `alpha` alive and nothing else; the straight-through one keeps nothing unless `alpha`
    is trained.

    Args:
        weight: Any shape; float16, bfloat16, float32 or float64.
        alpha: The threshold, not negative, in units of the weight: a number, or a tensor that
            broadcasts to the weight's shape (it is rounded to the weight's dtype). The sign of a
            tensor is not checked, because that would synchronise with the device.
        straight_through: Pass the gradient on to pruned weights too.

    Returns:
        The sparse weight, in the weight's shape and dtype.

    Raises:
        ValueError: If a numeric `alpha` is negative or not finite.

    Example:
        >>> import torch
        >>> from torch_adapmtl import soft_threshold
        >>> soft_threshold(torch.tensor([-1.0, -0.25, 0.0, 0.75]), 0.5)
        tensor([-0.5000,  0.0000,  0.0000,  0.2500])
    """  # noqa: E501
    if isinstance(alpha, Tensor):
        return _apply(weight, alpha, None, straight_through)
    value = _check_threshold("alpha", alpha)
    alpha = torch.full((), value, dtype=weight.dtype, device=weight.device)
    return _apply(weight, alpha, _round_to(value, weight.dtype), straight_through)


def _apply(
    weight: Tensor, alpha: Tensor, value: float | None, straight_through: bool
) -> Tensor:
    if torch.compiler.is_compiling():
        value = None  # a number would be a constant of the graph, and the budget moves it
    return _SoftThreshold.apply(weight, alpha, value, straight_through)  # type: ignore[no-any-return,no-untyped-call]


def _check_threshold(name: str, value: float) -> float:
    value = float(value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return value


def _round_to(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


class SoftThreshold(nn.Module):
    """The parametrization that replaces a weight by its soft-thresholded value (AdapMTL, Section 3).

    Register it with `torch.nn.utils.parametrize.register_parametrization`, or let
    [`soft_threshold_unstructured`][torch_adapmtl.soft_threshold_unstructured] or
    [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] do it.

    Args:
        threshold: The threshold alpha: a number, or an `nn.Parameter` holding one number, which is
            then trained with the weights.
        straight_through: See [`soft_threshold`][torch_adapmtl.soft_threshold].
        mask: Boolean tensor in the weight's shape; entries where it is False are zero whatever the
            threshold, and receive no gradient.
        persistent: Whether the threshold and the mask are part of the `state_dict`. Thresholds
            that belong to a component are not; the component keeps them.

    Attributes:
        alpha: The threshold, a 0-d tensor.
        mask: The mask, or None.

    Raises:
        ValueError: If `threshold` is negative, not finite, or a tensor of more than one number.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from torch_adapmtl import SoftThreshold
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> _ = parametrize.register_parametrization(layer, "weight", SoftThreshold(0.25))
        >>> layer(torch.ones(1, 2))
        tensor([[1.5000]], grad_fn=<MmBackward0>)
    """

    alpha: Tensor
    mask: Tensor | None

    def __init__(
        self,
        threshold: float | nn.Parameter = 0.0,
        *,
        straight_through: bool = False,
        mask: Tensor | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        self.straight_through = straight_through
        # alpha as a Python number, with the tensor and the version of it that the number was read
        # from: reading it again would synchronise with the device.
        self._known: tuple[Tensor, int, float] | None = None
        if isinstance(threshold, Tensor):
            if threshold.numel() != 1:
                raise ValueError(
                    f"threshold must hold one number, got a tensor of shape "
                    f"{tuple(threshold.shape)}; register one SoftThreshold a tensor"
                )
            self.alpha = threshold
        else:
            self.register_buffer("alpha", torch.zeros(()), persistent=persistent)
            self.set_threshold(threshold)
        self.register_buffer("mask", mask, persistent=persistent)

    @torch.no_grad()
    def set_threshold(self, value: float) -> None:
        """Set alpha to `value`, without a synchronisation with the device.

        Raises:
            ValueError: If `value` is negative or not finite.
        """
        value = _check_threshold("threshold", value)
        self.alpha.fill_(value)
        self._known = (self.alpha, self.alpha._version, _round_to(value, self.alpha.dtype))

    def threshold(self) -> Tensor:
        """The threshold that `forward` applies: a 0-d tensor, differentiable where it is learned."""
        return self.alpha

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sparse weight, in the shape and dtype of `weight`."""
        value = self._value()
        if value != 0.0:
            weight = _apply(weight, self.threshold(), value, self.straight_through)
        if self.mask is not None:
            weight = torch.where(self.mask, weight, 0.0)
        return weight

    def _value(self) -> float | None:
        if self._known is None or torch.compiler.is_compiling() or self.alpha.is_inference():
            return None
        alpha, version, value = self._known
        # Anything else that wrote to or replaced alpha made the number stale.
        return value if alpha is self.alpha and alpha._version == version else None

    def _apply(self, fn: Any, recurse: bool = True) -> SoftThreshold:
        # Moving to another device or dtype replaces or rewrites alpha: the number follows.
        value = self._value()
        super()._apply(fn, recurse)
        if value is not None and not self.alpha.is_meta:
            self._known = (
                self.alpha, self.alpha._version, _round_to(value, self.alpha.dtype)
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor starts at another version: pass the number on as it is now.
        return {**self.__dict__, "_known": self._value()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        value: Any = self._known
        if value is not None:
            self._known = (self.alpha, self.alpha._version, value)

    def extra_repr(self) -> str:
        """Show the options that differ from the defaults."""
        parts = ["straight_through=True"] if self.straight_through else []
        return ", ".join(parts + (["masked"] if self.mask is not None else []))


class SoftThresholdPruning(prune.PruningContainer):
    """The soft threshold as a `torch.nn.utils.prune` method.

    Use [`soft_threshold_unstructured`][torch_adapmtl.soft_threshold_unstructured] for one tensor, or
    pass this class as `pruning_method` (with `threshold=`) to
    `torch.nn.utils.prune.global_unstructured`, which turns it into plain masks.

    On a module it is the mark that `prune.is_pruned` and `prune.remove` look for; the sparse weight
    itself is computed by a [`SoftThreshold`][torch_adapmtl.SoftThreshold] parametrization, so the
    module can be copied and pickled at any time. `prune.remove` writes the sparse weight into the
    parameter. A mask that `torch.nn.utils.prune` put on the tensor earlier is taken over. A later
    prune call on the tensor raises an error.

    Args:
        threshold: Magnitude up to which a weight is pruned; a finite number >= 0.

    Raises:
        ValueError: If `threshold` is negative or not finite.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torch_adapmtl import SoftThresholdPruning
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.25, 2.0]]))
        >>> prune.global_unstructured([(layer, "weight")], SoftThresholdPruning, threshold=1.0)
        >>> layer.weight_mask
        tensor([[0., 1.]])
    """

    # A container, because that is the only kind of existing method that torch asks (through
    # `add_pruning_method`) before it stacks another one on top.
    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = _check_threshold("threshold", threshold)
        self._module: weakref.ref[nn.Module] | None = None

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return `default_mask` with zeros where `|t| <= threshold`."""
        return default_mask * (t.abs() > self.threshold).to(default_mask.dtype)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """Return the sparse value of the tensor that this method prunes on `module`."""
        sparse: Tensor = getattr(module, self._tensor_name)
        return sparse

    def prune(
        self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None
    ) -> Tensor:
        """Return `t`, soft-thresholded and masked; shapes and dtype are those of `t`."""
        scores = t if importance_scores is None else importance_scores
        mask = self.compute_mask(scores, torch.ones_like(t) if default_mask is None else default_mask)
        return soft_threshold(t, self.threshold) * mask

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, threshold: float = 0.0
    ) -> SoftThresholdPruning:
        """Attach a soft threshold to `module.<name>` and return the method."""
        parametrization = SoftThreshold(threshold)
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            parametrization = parametrization.to(device=tensor.device, dtype=tensor.dtype)
        return attach_threshold(module, name, parametrization)

    def remove(self, module: nn.Module) -> None:
        """Write the sparse value into the parameter and leave a plain `module.<name>`."""
        with torch.no_grad():
            sparse = self.apply_mask(module)
            parameter = detach(module, self._tensor_name)
            parameter.copy_(sparse)

    def add_pruning_method(self, method: prune.BasePruningMethod) -> None:
        """Refuse: a soft threshold is still at work on this tensor."""
        module = None if self._module is None else self._module()
        if module is not None:  # torch has taken the mark off already: put it back
            module.register_forward_pre_hook(self)
        raise RuntimeError(
            f"cannot apply {type(method).__name__} to {self._tensor_name!r}, which has a soft "
            f"threshold attached: call finalize() on the handle that apply_adapmtl returned, or "
            f"torch.nn.utils.prune.remove(module, {self._tensor_name!r}), first"
        )

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do nothing before the forward: the parametrization computes the weight."""
        self._module = weakref.ref(module)  # a copied module's mark learns its module here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}


def attach_threshold(
    module: nn.Module, name: str, parametrization: SoftThreshold
) -> SoftThresholdPruning:
    """Attach `parametrization` and the mark that `torch.nn.utils.prune` looks for.

    A mask of `torch.nn.utils.prune` on the tensor moves into the parametrization.
    """
    method = SoftThresholdPruning()
    method._tensor_name = name
    method._module = weakref.ref(module)
    earlier = _find_method(module, name)
    if isinstance(earlier, SoftThresholdPruning):
        raise RuntimeError(
            f"{name!r} of {type(module).__name__} already has a soft threshold; remove it first "
            f"with torch.nn.utils.prune.remove(module, {name!r}) or the handle's finalize()"
        )
    if earlier is not None:
        parametrization.mask = _take_mask(module, name)
    if not isinstance(getattr(module, name, None), Tensor):
        raise ValueError(f"name: {type(module).__name__} has no parameter {name!r}")
    attach(module, name, parametrization)
    module.register_forward_pre_hook(method)
    return method


def _find_method(module: nn.Module, name: str) -> prune.BasePruningMethod | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None


def _take_mask(module: nn.Module, name: str) -> Tensor:
    """Turn a tensor masked by torch.nn.utils.prune into a plain one and return its mask."""
    mask = module._buffers.pop(name + "_mask")
    original = module._parameters.pop(name + "_orig")
    assert mask is not None
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
    delattr(module, name)
    setattr(module, name, original)
    return mask != 0


def detach_threshold(module: nn.Module, name: str) -> nn.Parameter:
    """Undo `attach_threshold`: leave the parameter itself, with the values it holds."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, SoftThresholdPruning) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
    return detach(module, name)


def soft_threshold_unstructured(module: nn.Module, name: str, threshold: float) -> nn.Module:
    """Prune `module.<name>` by a soft threshold, in the style of `torch.nn.utils.prune`.

    Args:
        module: The module that holds the tensor.
        name: The tensor's name in the module, `"weight"` for instance.
        threshold: The threshold alpha, in units of the weight.

    Returns:
        The module itself, changed in place. `torch.nn.utils.prune.remove(module, name)` makes the
        pruning permanent.

    Raises:
        ValueError: If the module has no such parameter, or `threshold` is negative or not finite.
        RuntimeError: If the tensor has a soft threshold already.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torch_adapmtl import soft_threshold_unstructured
        >>> layer = soft_threshold_unstructured(torch.nn.Linear(8, 8), "weight", 0.1)
        >>> prune.is_pruned(layer)
        True
        >>> _ = prune.remove(layer, "weight")
        >>> bool((layer.weight == 0).any())
        True
    """
    SoftThresholdPruning.apply(module, name, threshold)
    return module


def attached_threshold(module: nn.Module, name: str) -> SoftThreshold | None:
    """Return the soft threshold at work on `module.<name>`, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    plist: Any = module.parametrizations[name]  # type: ignore[index]
    return next((p for p in plist if isinstance(p, SoftThreshold)), None)
