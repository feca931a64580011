"""Which tensors of a module are prunable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_adapmtl._checks import obstacle, trouble_of_inference
from torch_adapmtl._distributed import is_sharded

__all__ = [
    "DEFAULT_PRUNABLE",
    "Prunable",
    "check_weight",
    "named_parameters",
    "prunable_by_default",
    "prunable_names",
]

Prunable = Mapping[type[nn.Module], str | Iterable[str]]

DEFAULT_PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("weight",),  # convolutions and transposed convolutions
    nn.Linear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def prunable_by_default(module: nn.Module) -> tuple[str, ...]:
    """The names of the tensors of a module that are prunable unless the user says otherwise."""
    kind = next((k for k in type(module).__mro__ if k in DEFAULT_PRUNABLE), None)
    return DEFAULT_PRUNABLE[kind] if kind is not None else ()


def prunable_names(prunable: Prunable | None) -> dict[type[nn.Module], tuple[str, ...]]:
    patterns = dict(DEFAULT_PRUNABLE)
    if prunable is None:
        return patterns
    if not isinstance(prunable, Mapping):
        raise TypeError(
            "prunable must map module types to tensor names or globs, found "
            f"{type(prunable).__name__}"
        )
    for kind, names in dict[Any, Any](prunable).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"prunable: keys must be module types, found {kind!r}")
        several = isinstance(names, Iterable) and not isinstance(names, str)
        listed = tuple(names) if several else (names,)
        if not all(isinstance(n, str) for n in listed):
            raise TypeError(
                f"prunable[{kind.__name__}] must be a tensor name or glob, or several of them, "
                f"found {names!r}; () leaves the type out"
            )
        patterns[kind] = listed
    return patterns


def named_parameters(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The parameters of one module: the name they are used by, the one they are kept by."""
    if isinstance(module, parametrize.ParametrizationList):
        return  # told of by the module whose tensor it makes
    for raw, parameter in module._parameters.items():
        if parameter is not None:
            public = raw.removesuffix("_orig")
            masked = public != raw and f"{public}_mask" in module._buffers  # torch.nn.utils.prune
            yield public if masked else raw, raw, parameter
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for public, chain in parametrizations.items():
            original = chain._parameters.get("original")
            # Torch promises the same shape unless told not to look.
            if isinstance(original, nn.Parameter) and not chain.unsafe:
                yield public, f"parametrizations.{public}.original", original


def check_weight(name: str, weight: nn.Parameter) -> None:
    """Raise a `ValueError` unless the weight can be pruned and trained as it is."""
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device; give the model its weights first "
            "(model.to_empty(device=...) and load_state_dict), or leave it out with exclude="
        )
    problem = obstacle(weight) or trouble_of_inference(weight)
    kind: Any = weight
    # Torchao's quantised weights pass for float ones.
    if is_traceable_wrapper_subclass(kind) and not is_sharded(weight):
        problem = (
            f"is a {type(weight).__name__}, which stands for other tensors; prune the model "
            "before it is quantised or wrapped"
        )
    if problem:
        raise ValueError(f"{name} {problem}; or leave it out with exclude=")
