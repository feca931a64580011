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
    "prunable_patterns",
]

Prunable = Mapping[type[nn.Module], str | Iterable[str]]

DEFAULT_PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("weight",),  # convolutions and transposed convolutions
    nn.Linear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def prunable_by_default(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors of a module that are prunable unless the user says no."""
    kind = next((k for k in type(module).__mro__ if k in DEFAULT_PRUNABLE), None)
    return DEFAULT_PRUNABLE[kind] if kind is not None else ()


def prunable_patterns(prunable: Prunable | None) -> dict[type[nn.Module], tuple[str, ...]]:
    """Return names and globs of prunable tensors by module type: the default and the user's.

    Raises:
        TypeError: If `prunable` is not of the form that `find_components` takes.
    """
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
        if not all(isinstance(name, str) for name in listed):
            raise TypeError(
                f"prunable[{kind.__name__}] must be a tensor name or glob, or several of them, "
                f"found {names!r}; () leaves the type out"
            )
        patterns[kind] = listed
    return patterns


def named_parameters(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the parameters of one module, each with two names.

    The first is the attribute that `forward` uses, the second the one in `named_parameters()`.
    They differ where `torch.nn.utils.prune` or `torch.nn.utils.parametrize` makes the attribute.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return  # its parameters are those of the module whose tensor it makes
    for stored, parameter in module._parameters.items():
        if parameter is not None:
            used = stored.removesuffix("_orig")
            masked = used != stored and f"{used}_mask" in module._buffers  # torch.nn.utils.prune
            yield used if masked else stored, stored, parameter
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for used, chain in parametrizations.items():
            original = chain._parameters.get("original")
            # Unless `unsafe`, torch has checked that the shape stays the same.
            if isinstance(original, nn.Parameter) and not chain.unsafe:
                yield used, f"parametrizations.{used}.original", original


def check_weight(name: str, weight: nn.Parameter) -> None:
    """Raise a `ValueError` unless the weight can be pruned and trained as it is."""
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device; give the model its weights first "
            "(model.to_empty(device=...) and load_state_dict), or leave it out with exclude="
        )
    problem = obstacle(weight) or trouble_of_inference(weight)
    tensor: Any = weight
    # Torchao's quantised weights say that they are float tensors.
    if is_traceable_wrapper_subclass(tensor) and not is_sharded(weight):
        problem = (
            f"is a {type(weight).__name__}, which stands for other tensors; prune the model "
            "before it is quantised or wrapped"
        )
    if problem:
        raise ValueError(f"{name} {problem}; or leave it out with exclude=")
