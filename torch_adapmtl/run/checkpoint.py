"""The state of a run in the model's state dict, and the check of a state dict before it is loaded.

`load_state_dict` loads module by module and reports mismatches at the end, when a part of the state
is already in the model. A hook on the model checks the state of the pruner before anything is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.sparse_weights import forget_residual
from torch_adapmtl.run._packing import damaged, pack, unpack, unpack_mask
from torch_adapmtl.run.history import is_progress
from torch_adapmtl.tensor.torch_prune import attached_threshold

__all__ = ["guard", "load", "save", "unguard"]

_VERSION = 5
_PREFIX = "adapmtl."


def save(config: Mapping[str, Any], progress: Mapping[str, Any], layers: Layers) -> Tensor:
    """Pack the config, the progress, and the present and initial masks of a run.

    Args:
        config: The values that are constant during a run.
        progress: The values that change during a run; a few numbers.
        layers: The layers.
    """
    header = {"version": _VERSION, **config, "layers": layers.names}
    masks = [layer.mask for layer in layers] + [layer.initial_mask for layer in layers]
    return pack(header, progress, masks, 2 * layers.sizes)


def load(state: Tensor, expected: Mapping[str, Any], layers: Layers) -> dict[str, Any]:
    """Load a result of `save`: set the masks of the layers and return the progress.

    Raises:
        ValueError: If `_read` raises it; no mask has been changed then.
    """
    progress, masks = _read(state, expected, layers)
    present, initial = masks[: len(layers)], masks[len(layers) :]
    for layer, mask, first in zip(layers, present, initial, strict=True):
        layer.threshold.mask, layer.initial_mask = mask, first
    return progress


def _read(
    state: object, expected: Mapping[str, Any], layers: Layers
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Read a result of `save`, and check that it belongs to this run.

    Args:
        state: The tensor of bytes.
        expected: The values of config and progress that the state must have.
        layers: The layers; the state must have the same names and components.

    Returns:
        The progress, and the masks: the present masks of all layers, then the initial masks.

    Raises:
        ValueError: If the state is damaged, or comes from another version, or from a run with
            another config or other layers.
    """
    header, progress, packed = unpack(state)
    if header.get("version") != _VERSION:
        raise ValueError(
            f"the state dict's adapmtl state has version {header.get('version')!r}, this version "
            f"of torch-adapmtl reads {_VERSION}: load it with the version that it was saved with"
        )
    names = "step", "fixed", "initial", "history"
    step, fixed, initial, history = (progress.get(name) for name in names)
    if (
        type(step) is not int
        or step < 0
        or type(fixed) is not bool
        or type(initial) not in (int, float)
        or not is_progress(history)
    ):
        found = f"step={step!r}, fixed={fixed!r}, initial={initial!r}, history={history!r}"
        raise damaged(f"it says {found}")
    saved = {**header, **progress}
    for name, value in expected.items():
        differences = list(_differences(name, saved.get(name), value))
        if differences:
            # A setting that both have says more than one that only one of them has.
            path, saved_value, own_value = min(differences, key=lambda found: None in found)
            raise ValueError(
                f"the state dict comes from a run with {path}={saved_value!r}, this model was "
                f"prepared with {path}={own_value!r}: prepare it alike"
            )
    if not isinstance(header.get("layers"), dict):
        raise damaged("it names no layers")
    if list(header["layers"].items()) != list(layers.names.items()):
        saved_order, order = list(header["layers"]), list(layers.names)
        differing = dict(sorted(header["layers"].items() ^ layers.names.items()))
        raise ValueError(
            f"the state dict comes from a model in which other tensors were pruned, or in "
            f"other components; they differ in {differing}: prepare the model alike (groups, "
            f"prunable, exclude)"
            if differing
            else f"the state dict comes from a model whose tensors are in another order, "
            f"{saved_order} and not {order}: make the model alike"
        )
    masks = [
        None if bits is None else unpack_mask(bits, layer.weight)
        for layer, bits in zip((*layers, *layers), packed, strict=True)
    ]
    return progress, masks


def _differences(path: str, saved: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences of two settings: a dotted path and both values."""
    if isinstance(saved, dict) and isinstance(expected, dict):
        for name in {**expected, **saved}:
            yield from _differences(f"{path}.{name}", saved.get(name), expected.get(name))
    elif saved != expected:
        yield path, saved, expected


def guard(model: nn.Module, layers: Layers) -> None:
    """Check each state dict that is loaded into a model with a pruner, or a part, from now on."""
    model.register_load_state_dict_pre_hook(_check)
    for module in {owner: None for layer in layers for owner, _ in layer.owners}:
        module.register_load_state_dict_pre_hook(_check_part)


def unguard(model: nn.Module, layers: Layers) -> None:
    """Undo `guard`."""
    for module in {model, *(owner for layer in layers for owner, _ in layer.owners)}:
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", None) in (_check, _check_part):
                del hooks[key]


def _check_part(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Prepare the pruned tensors of a module, which may be loaded on its own, for loading."""
    for name in (*module._parameters, *getattr(module, "parametrizations", ())):
        if prefix + name not in state_dict:
            continue
        if attached_threshold(module, name) is not None:
            raise _refused(f"{prefix}{name}")
        # The residual of the old weight does not belong to the new one. If the state dict has the
        # new one's, it is loaded later, because the pruner is the last submodule.
        forget_residual(module, name)


def _check(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Raise a `ValueError` unless the state dict is of a model that was prepared alike."""
    pruner: Any = model._modules.get("adapmtl")
    if pruner is None:  # the user has removed the pruner from a copy
        return
    part = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    if _PREFIX + "_extra_state" not in part:
        for layer in pruner.layers:
            if layer.name in part:
                raise _refused(layer.name)
        return
    _read(part[_PREFIX + "_extra_state"], pruner._expected_state(), pruner.layers)
    for layer in pruner.layers:
        if layer.key not in part:
            raise ValueError(
                f"the state dict has no {layer.key!r}, although it has the state of a pruner: save "
                f"and load the state dict of the whole model"
            )
        _check_shape(layer.key, layer.weight, part, "of another model: make the model alike")
    wanted = {_PREFIX + name for name in pruner.state_dict(keep_vars=True)}
    saved = {name for name in part if name.startswith(_PREFIX)}
    if wanted != saved:
        raise ValueError(
            f"the state dict comes from a run with other options: it has "
            f"{sorted(saved - wanted)}, and not {sorted(wanted - saved)}; prepare the model alike"
        )
    for name, tensor in pruner.state_dict(keep_vars=True).items():
        _check_shape(_PREFIX + name, tensor, part, "with other options: prepare the model alike")


def _refused(name: str) -> ValueError:
    return ValueError(
        f"the state dict has {name!r} of the model without apply_adapmtl, and no state of the "
        f"pruner: load it before apply_adapmtl, or after finalize() or undo()"
    )


def _check_shape(name: str, tensor: Tensor, part: Mapping[str, Any], remedy: str) -> None:
    value = part.get(name)
    if not isinstance(value, Tensor):
        return
    shape, expected = tuple(value.shape), tuple(tensor.shape)
    if shape != expected and (shape, expected) != ((1,), ()):  # torch accepts this pair
        raise ValueError(
            f"the state dict's {name} has shape {shape}, this model's {expected}; it comes from a "
            f"run {remedy}"
        )
