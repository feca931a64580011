"""The soft threshold as a `torch.nn.utils.prune` method."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod, PruningContainer, custom_from_mask

from torch_adapmtl._checks import check_threshold, obstacle, trouble_of_inference
from torch_adapmtl.tensor._parametrize import attach, detach
from torch_adapmtl.tensor.thresholding import SoftThreshold, soft_threshold

__all__ = ["SoftThresholdPruning", "soft_threshold_unstructured"]


class SoftThresholdPruning(PruningContainer):
    """The soft threshold as a `torch.nn.utils.prune` method.

    Use [`soft_threshold_unstructured`][torch_adapmtl.soft_threshold_unstructured] for one tensor,
    or pass this class as `pruning_method` (with `threshold=`) to
    `torch.nn.utils.prune.global_unstructured`, which turns it into plain masks.

    On a module, an instance of this class is the hook by which `prune.is_pruned` and `prune.remove`
    recognise pruning. The sparse weight is computed by a
    [`SoftThreshold`][torch_adapmtl.SoftThreshold] parametrization, so the module can be copied and
    pickled at any time. `prune.remove` writes the sparse weight into the parameter. An earlier mask
    of `torch.nn.utils.prune` on the tensor moves into the parametrization. A later prune call on
    the tensor raises an error.

    Args:
        threshold: Magnitude up to which a weight is pruned; a finite number >= 0.

    Raises:
        ValueError: If `threshold` is negative or not finite.
        TypeError: If `threshold` is not a number.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torch_adapmtl import SoftThresholdPruning
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.25, 2.0]]))
        >>> prune.global_unstructured(
        ...     [(layer, "weight")], SoftThresholdPruning, threshold=1.0
        ... )
        >>> layer.weight_mask
        tensor([[0., 1.]])
    """

    # A container, because only on containers torch calls `add_pruning_method` when another method
    # is applied to the tensor.
    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = check_threshold("threshold", threshold)
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
        mask = self.compute_mask(
            scores, torch.ones_like(t) if default_mask is None else default_mask
        )
        return soft_threshold(t, self.threshold) * mask

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, threshold: float = 0.0
    ) -> SoftThresholdPruning:
        """Attach a soft threshold to `module.<name>` and return the method."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {module!r}")
        parametrization = SoftThreshold(threshold)
        held = held_parameter(module, name)
        if is_lazy(held):
            raise ValueError(
                f"name: {name!r} of {type(module).__name__} is not initialised yet (a lazy "
                f"module); run one batch through it first"
            )
        if problem := obstacle(held) or trouble_of_inference(held):
            raise TypeError(f"name: {name!r} of {type(module).__name__} {problem}")
        parametrization = parametrization.to(device=held.device, dtype=held.dtype)
        parametrization.set_threshold(threshold)  # again, because the first was rounded to float32
        return attach_threshold(module, name, parametrization)

    def remove(self, module: nn.Module) -> None:
        """Write the sparse value into the parameter and leave a plain `module.<name>`."""
        threshold = attached_threshold(module, self._tensor_name)
        if threshold is None:
            return  # removed already by torch.nn.utils.parametrize.remove_parametrizations
        with torch.no_grad():
            parameter = held_parameter(module, self._tensor_name)
            parameter.copy_(threshold(parameter))
        detach(module, self._tensor_name)

    def add_pruning_method(self, method: BasePruningMethod) -> None:
        """Raise an error: no other method can be applied on top of the soft threshold."""
        module = None if self._module is None else self._module()
        if module is not None:  # torch has removed this hook already, so restore it
            module.register_forward_pre_hook(self)
        raise RuntimeError(
            f"cannot apply {type(method).__name__} to {self._tensor_name!r}, which has a soft "
            f"threshold attached: call finalize() on the pruner that apply_adapmtl returned, or "
            f"torch.nn.utils.prune.remove(module, {self._tensor_name!r}), first"
        )

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do nothing before the forward pass; the parametrization computes the weight."""

    def __getstate__(self) -> dict[str, Any]:
        # The module instead of a weak reference, so that a copied hook refers to the copied module.
        return {**self.__dict__, "_module": None if self._module is None else self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["_module"]
        self.__dict__.update(state, _module=None if module is None else weakref.ref(module))


def attach_threshold(
    module: nn.Module, name: str, parametrization: SoftThreshold
) -> SoftThresholdPruning:
    """Attach `parametrization`, and the hook by which `torch.nn.utils.prune` recognises pruning.

    A mask of `torch.nn.utils.prune` on the tensor moves into the parametrization.
    """
    if attached_threshold(module, name) is not None:
        raise RuntimeError(
            f"{name!r} of {type(module).__name__} already has a soft threshold; remove it first "
            f"with torch.nn.utils.prune.remove(module, {name!r}) or the pruner's finalize()"
        )
    take_earlier_mask(module, name, parametrization)
    method = SoftThresholdPruning()
    method._tensor_name = name
    method._module = weakref.ref(module)
    attach(module, name, parametrization)
    module.register_forward_pre_hook(method)
    return method


def take_earlier_mask(module: nn.Module, name: str, threshold: SoftThreshold) -> None:
    """Move a mask of `torch.nn.utils.prune` on the tensor into the threshold."""
    held_parameter(module, name)
    earlier = _find_method(module, name)
    if isinstance(earlier, SoftThresholdPruning):
        _remove_hook(module, name)  # left behind by parametrize.remove_parametrizations
    elif earlier is not None:
        threshold.mask = threshold.earlier_mask = _take_mask(module, name)


def held_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter `module.<name>`, or the one from which it is computed."""
    if (plain := module._parameters.get(name)) is not None:
        return plain
    if parametrize.is_parametrized(module, name):
        plist: Any = module.parametrizations[name]  # type: ignore[index]
        parameter = plist._parameters.get("original")
        if parameter is None:
            raise ValueError(
                f"name: {name!r} of {type(module).__name__} is made from several tensors by "
                f"{type(plist[0]).__name__}; leave it out, or first call "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            )
    else:
        parameter = module._parameters.get(name)
        if parameter is None and _find_method(module, name) is not None:
            parameter = module._parameters.get(name + "_orig")
        if parameter is None:
            held = [key for key, value in module._parameters.items() if value is not None]
            raise ValueError(
                f"name: {type(module).__name__} has no parameter {name!r}, only {held}"
            )
    return parameter  # type: ignore[no-any-return]


def _find_method(module: nn.Module, name: str) -> BasePruningMethod | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None


def is_masked(module: nn.Module, name: str) -> bool:
    """Whether `torch.nn.utils.prune` masks `module.<name>`."""
    return name + "_mask" in module._buffers and _find_method(module, name) is not None


def _take_mask(module: nn.Module, name: str) -> Tensor:
    """Turn a tensor masked by torch.nn.utils.prune into a plain one and return its mask."""
    mask = module._buffers.pop(name + "_mask")
    original = module._parameters.pop(name + "_orig")
    assert mask is not None
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
    delattr(module, name)
    setattr(module, name, original)
    return mask != 0


def detach_threshold(module: nn.Module, name: str) -> nn.Parameter:
    """Undo `attach_threshold`: restore the parameter, with its values unchanged."""
    _remove_hook(module, name)
    return detach(module, name)


def put_back(module: nn.Module, name: str, threshold: SoftThreshold) -> None:
    """Restore the mask of `torch.nn.utils.prune` that the tensor had before `threshold`."""
    if threshold.earlier_mask is not None:
        device = held_parameter(module, name).device
        custom_from_mask(module, name, threshold.earlier_mask.to(device))


def _remove_hook(module: nn.Module, name: str) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, SoftThresholdPruning) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]


def soft_threshold_unstructured(module: nn.Module, name: str, threshold: float) -> nn.Module:
    """Prune `module.<name>` by a soft threshold, like a function of `torch.nn.utils.prune`.

    Args:
        module: The module that holds the tensor.
        name: The tensor's name in the module, `"weight"` for instance.
        threshold: The threshold alpha, in units of the weight.

    Returns:
        The module itself, changed in place. `torch.nn.utils.prune.remove(module, name)` makes the
        pruning permanent.

    Raises:
        ValueError: If the module has no such parameter or has not initialised it yet, or
            `threshold` is negative or not finite.
        TypeError: If `module` is not a module, the parameter is not a dense floating-point tensor,
            or `threshold` is not a number.
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
    """Return the soft threshold on `module.<name>`, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    plist: Any = module.parametrizations[name]  # type: ignore[index]
    return next((p for p in plist if isinstance(p, SoftThreshold)), None)


def find_threshold(model: nn.Module) -> str | None:
    """Return the name of the first tensor with a soft threshold in a model, or None."""
    for path, module in model.named_modules():
        if isinstance(module, SoftThreshold):
            return str(path).replace("parametrizations.", "").rpartition(".")[0]
    return None
