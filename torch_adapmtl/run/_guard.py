"""Refusing a state dict that is not for this run before any of it is loaded.

Torch loads module by module and complains at the end, when weights of another run are in the model
already. A hook on the model looks at the library's own part of the state dict first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.run.checkpoint import read

__all__ = ["guard", "unguard"]

_OWN = "adapmtl."


def guard(model: nn.Module) -> None:
    """Check what is loaded into `model`, which has a handle, from now on."""
    model.register_load_state_dict_pre_hook(_check)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check]:
        del hooks[key]


def _check(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Raise a `ValueError` if the state dict is of a model that was prepared otherwise, or not."""
    handle: Any = model._modules.get("adapmtl")
    if handle is None:  # a copy that somebody has taken apart
        return
    given = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    if _OWN + "_extra_state" not in given:
        _check_prepared(handle, given)
        return
    read(given[_OWN + "_extra_state"], handle._settings(), handle._layers)
    for layer in handle._layers:
        name = _kept(layer.name)
        _check_shape(name, layer.weight, given, "of another model: make the model alike")
    wanted = {_OWN + name for name in handle.state_dict(keep_vars=True)}
    found = {name for name in given if name.startswith(_OWN)}
    if wanted != found:
        raise ValueError(
            f"the state dict comes from a run with other options: it has "
            f"{sorted(found - wanted)}, and not {sorted(wanted - found)}; prepare the model alike"
        )
    for name, own in (*handle.named_parameters(), *handle.named_buffers()):
        _check_shape(_OWN + name, own, given, "with other options: prepare the model alike")


def _check_prepared(handle: Any, given: Mapping[str, Any]) -> None:
    for layer in handle._layers:
        if layer.name in given and _kept(layer.name) not in given:
            raise ValueError(
                f"the state dict is of the model without apply_adapmtl: it has {layer.name!r}, "
                f"not {_kept(layer.name)!r}. Load it before apply_adapmtl, or after finalize()"
            )


def _kept(name: str) -> str:
    """The name of a layer's parameter while there is a threshold on it."""
    path, _, tensor = name.rpartition(".")
    return ".".join(filter(None, (path, "parametrizations", tensor, "original")))


def _check_shape(name: str, own: Tensor, given: Mapping[str, Any], remedy: str) -> None:
    value = given.get(name)
    if not isinstance(value, Tensor):
        return
    shape, expected = tuple(value.shape), tuple(own.shape)
    if shape != expected and (shape, expected) != ((1,), ()):  # which torch lets pass
        raise ValueError(
            f"the state dict's {name} has shape {shape}, this model's {expected}; it comes from a "
            f"run {remedy}"
        )
