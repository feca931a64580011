"""The prunable tensors of a model, and finding them by name, glob, module or parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_adapmtl._checks import DTYPES, obstacle
from torch_adapmtl._distributed import is_sharded
from torch_adapmtl.components._prunable import (
    DEFAULT_PRUNABLE,
    Prunable,
    check_weight,
    named_parameters,
    prunable_patterns,
)
from torch_adapmtl.components._unwrap import unwrap

__all__ = ["Groups", "Inventory", "OwnedParameter", "Selector", "Selectors"]

Selector = str | nn.Module | Tensor
Selectors = Selector | Iterable[Selector]
Groups = Mapping[str, Selectors]

# Parts of qualified names that wrappers inside a model add. Users may leave them out.
_WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(eq=False)
class OwnedParameter:
    """A parameter of the model, the modules that hold it, and its qualified names."""

    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class Inventory:
    """The prunable tensors of a model.

    Args:
        model: The model, unwrapped.
        prunable: Prunable tensors by module type, as in `find_components`.
        exclude: What is left out, as in `find_components`.

    Attributes:
        prunable: The prunable tensors by the parameter's id, in the order of `model.parameters()`.

    Raises:
        ValueError: If the model is lazy or sharded, if nothing is prunable, or if a tensor to prune
            is on the meta device, is not an ordinary dense tensor or cannot be trained.
    """

    def __init__(self, model: nn.Module, prunable: Prunable | None, exclude: Selectors) -> None:
        _check_model(model)
        self._modules: dict[str, nn.Module] = {}
        self._parameter_ids: dict[str, int] = {}  # by name
        self._rejected: list[str] = []  # why tensors that match are not prunable, for errors
        self.prunable = self._collect(model, prunable_patterns(prunable))
        self._ids = {id(parameter) for parameter in model.parameters()}
        for selector in _as_list(exclude, "exclude"):
            for key in self.select(selector, "exclude"):
                self.prunable.pop(key, None)
        if not self.prunable:
            raise ValueError(
                f"{type(model).__name__} has nothing to prune: no convolution or linear weight of "
                f"a floating-point type is left{self._first_rejected()}; name other tensors with "
                'prunable={ModuleType: "tensor_name"}, or narrow exclude='
            )
        for owned in self.prunable.values():
            check_weight(owned.names[0], owned.parameter)

    def _collect(
        self, model: nn.Module, patterns: Mapping[type[nn.Module], tuple[str, ...]]
    ) -> dict[int, OwnedParameter]:
        """Record the names of all modules and parameters; return the prunable parameters."""
        paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
            self._modules[path] = module
            self._modules.setdefault(_without_wrappers(path), module)
        owned: dict[int, OwnedParameter] = {}
        prunable: set[int] = set()
        unmatched: dict[tuple[type[nn.Module], str], nn.Module] = {}
        matched: set[tuple[type[nn.Module], str]] = set()
        for module, module_paths in paths.items():
            if "quantized" in type(module).__module__.split("."):
                self._rejected.append(
                    f"{module_paths[0] or 'the model'} is a quantised module "
                    f"({type(module).__name__}); prune the model in floating point and quantise "
                    f"it after finalize()"
                )
            kind = next((k for k in type(module).__mro__ if k in patterns), None)
            tensors = list(named_parameters(module))
            if kind is not None and patterns[kind] != DEFAULT_PRUNABLE.get(kind) and tensors:
                unmatched.update({(kind, pattern): module for pattern in patterns[kind]})
            for used, stored, parameter in tensors:
                key = id(parameter)
                entry = owned.setdefault(key, OwnedParameter(parameter))
                entry.owners.append((module, used))
                entry.names += [_join(path, used) for path in module_paths]
                for name in (_join(path, n) for n in (used, stored) for path in module_paths):
                    self._parameter_ids[name] = key
                    self._parameter_ids.setdefault(_without_wrappers(name), key)
                if kind is None:
                    continue
                matches = [p for p in patterns[kind] if fnmatchcase(used, p)]
                matched.update((kind, pattern) for pattern in matches)
                if matches and parameter.dtype in DTYPES:
                    prunable.add(key)
                elif matches:
                    self._rejected.append(f"{entry.names[0]} {obstacle(parameter)}")
        for (kind, pattern), module in unmatched.items():
            if (kind, pattern) not in matched:
                names = sorted(used for used, _, _ in named_parameters(module))
                raise ValueError(
                    f"prunable: {pattern!r} matches no tensor of {kind.__name__}, which has "
                    f"{', '.join(names) or 'none'}"
                )
        return {id(p): owned[id(p)] for p in model.parameters() if id(p) in prunable}

    def select(self, selector: Selector, argument: str) -> set[int]:
        """Return the ids of the prunable tensors that `selector` matches.

        Args:
            selector: A name, a glob, a module or a parameter.
            argument: The argument that it comes from, for errors.

        Raises:
            ValueError: If it matches no module or parameter of the model, prunable or not.
        """
        if isinstance(selector, nn.Module):
            module = unwrap(selector)
            if all(module is not other for other in self._modules.values()):
                raise ValueError(
                    f"{argument}: {_describe(selector)} is not a module of this model; pass one of "
                    "model.modules(), or its name"
                )
            return self._inside(module)
        if isinstance(selector, Tensor):
            if id(selector) not in self._ids:
                raise ValueError(
                    f"{argument}: the tensor of shape {tuple(selector.shape)} is not a parameter "
                    "of this model; pass one of model.parameters(), or its name"
                )
            return {id(selector)} & self.prunable.keys()
        if not isinstance(selector, str):
            raise TypeError(
                f"{argument}: a selector must be a name, a glob, a module or a parameter, found "
                f"{type(selector).__name__}"
            )
        selected = self._by_name(selector)
        if selected is None:
            raise ValueError(
                f"{argument}: {selector!r} matches no module or parameter of this model; see "
                "model.named_modules() for its names"
            )
        return selected

    def _by_name(self, selector: str) -> set[int] | None:
        """Return what a name or glob selects, or None if it matches nothing."""
        if selector in self._modules:
            return self._inside(self._modules[selector])
        if selector in self._parameter_ids:
            return {self._parameter_ids[selector]} & self.prunable.keys()
        if not any(character in selector for character in "*?["):
            return None
        modules = {m for name, m in self._modules.items() if fnmatchcase(name, selector)}
        keys = {key for name, key in self._parameter_ids.items() if fnmatchcase(name, selector)}
        if not modules and not keys:
            return None
        return (keys & self.prunable.keys()).union(*map(self._inside, modules))

    def _inside(self, module: nn.Module) -> set[int]:
        """Return the ids of the prunable tensors in a module and its submodules."""
        return {id(parameter) for parameter in module.parameters()} & self.prunable.keys()

    def assign(self, groups: Groups) -> dict[int, str]:
        """Return the group of each prunable tensor that `groups` selects, by id.

        Raises:
            ValueError: If a group selects nothing, or two groups select the same tensor.
        """
        assigned: dict[int, tuple[str, Selector]] = {}
        for group, selectors in groups.items():
            argument = f"groups[{group!r}]"
            count = 0
            for selector in _as_list(selectors, argument):
                for key in self.select(selector, argument):
                    count += 1
                    first, first_selector = assigned.setdefault(key, (group, selector))
                    if first != group:
                        raise ValueError(
                            f"groups: {first!r} (by {_describe(first_selector)}) and {group!r} (by "
                            f"{_describe(selector)}) both match {self._name_and_ties(key)}; leave "
                            "it to one of them"
                        )
            if not count:
                raise ValueError(
                    f"{argument} = {_describe(selectors)} matches no prunable tensor"
                    f"{self._first_rejected()}; leave the group out, or see prunable= and exclude="
                )
        return {key: group for key, (group, _) in assigned.items()}

    def _first_rejected(self) -> str:
        return f" (for one, {self._rejected[0]})" if self._rejected else ""

    def _name_and_ties(self, key: int) -> str:
        name, *others = self.prunable[key].names
        return f"{name!r} (tied to {', '.join(map(repr, others))})" if others else repr(name)


def _check_model(model: nn.Module) -> None:
    """Raise a `ValueError` if the model is lazy or sharded."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"{name} is not initialised yet (a lazy module); run one batch through the model "
                "first"
            )
        if is_sharded(tensor):
            raise ValueError(f"{name} is sharded (a DTensor); apply pruning before sharding")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for name, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise ValueError(
                    f"{name or 'the model'} is sharded (FullyShardedDataParallel); apply pruning "
                    "before sharding"
                )


def _as_list(selectors: Selectors, argument: str) -> list[Selector]:
    # Tensors, and modules such as Sequential, are iterable too.
    if isinstance(selectors, str | nn.Module | Tensor):
        return [selectors]
    if not isinstance(selectors, Iterable):
        raise TypeError(
            f"{argument} must be a name, glob, module or parameter, or several of them, found "
            f"{type(selectors).__name__}"
        )
    return list(selectors)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def _describe(selector: object) -> str:
    """Describe a selector, or several, for errors."""
    if isinstance(selector, nn.Module):
        return f"the {type(selector).__name__} module"
    if isinstance(selector, Tensor):
        return f"the parameter of shape {tuple(selector.shape)}"
    if isinstance(selector, list | tuple):
        return f"[{', '.join(map(_describe, selector))}]"
    return repr(selector)
