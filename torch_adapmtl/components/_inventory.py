"""The prunable tensors of a model, and naming some of them by name, glob, module or parameter."""

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
    prunable_names,
)
from torch_adapmtl.components._unwrap import unwrap

__all__ = ["Groups", "Inventory", "Selector", "Selectors"]

Selector = str | nn.Module | Tensor
Selectors = Selector | Iterable[Selector]
Groups = Mapping[str, Selectors]

# Wrappers inside a model put these into names that nobody would write.
_WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(eq=False)
class Found:
    """A parameter of the model with everything that holds it."""

    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    prunable: bool = False


class Inventory:
    """The parameters of an unwrapped model, by identity; `prunable` maps id to the prunable ones.

    Raises:
        ValueError: If the model is lazy or sharded or has nothing to prune, or a weight to prune is
            on the meta device or no plain dense tensor that can be trained.
    """

    def __init__(self, model: nn.Module, prunable: Prunable | None, exclude: Selectors) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._named: dict[str, int] = {}
        self._passed_over: list[str] = []  # what would be prunable if it were of another kind
        self._check_whole(model)
        self.prunable = self._collect(model, prunable_names(prunable))
        self._all = {id(parameter) for parameter in model.parameters()}
        for selector in _listed(exclude, "exclude"):
            for key in self.select(selector, "exclude"):
                self.prunable.pop(key, None)
        if not self.prunable:
            raise ValueError(
                f"{type(model).__name__} has nothing to prune: no convolution or linear weight of "
                f"a floating-point type is left{self._others()}; name other tensors with "
                'prunable={ModuleType: "tensor_name"}, or narrow exclude='
            )
        for entry in self.prunable.values():
            check_weight(entry.names[0], entry.parameter)

    @staticmethod
    def _check_whole(model: nn.Module) -> None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise ValueError(
                    f"{name} is not initialised yet (a lazy module); run one batch through the "
                    "model first"
                )
            if is_sharded(tensor):
                raise ValueError(f"{name} is sharded (a DTensor); apply pruning before sharding")
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None:
            kind = fsdp.FullyShardedDataParallel
            for name, module in model.named_modules():
                if isinstance(module, kind):
                    raise ValueError(
                        f"{name or 'the model'} is sharded (FullyShardedDataParallel); apply "
                        "pruning before sharding"
                    )

    def _collect(
        self, model: nn.Module, patterns: Mapping[type[nn.Module], tuple[str, ...]]
    ) -> dict[int, Found]:
        paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
            self._modules[path] = module
            self._modules.setdefault(_plain(path), module)
        found: dict[int, Found] = {}
        unmatched: dict[tuple[type[nn.Module], str], nn.Module] = {}
        matched: set[tuple[type | None, str]] = set()
        for module, module_paths in paths.items():
            if "quantized" in type(module).__module__.split("."):
                self._passed_over.append(
                    f"{module_paths[0] or 'the model'} is a quantised module "
                    f"({type(module).__name__}); prune the model in floating point and quantise "
                    f"it after finalize()"
                )
            kind = next((k for k in type(module).__mro__ if k in patterns), None)
            wanted = patterns[kind] if kind is not None else ()
            if (
                kind is not None
                and wanted != DEFAULT_PRUNABLE.get(kind)
                and any(named_parameters(module))
            ):
                unmatched.update({(kind, pattern): module for pattern in wanted})
            for public, raw, parameter in named_parameters(module):
                entry = found.setdefault(id(parameter), Found(parameter))
                entry.owners.append((module, public))
                entry.names += [_join(path, public) for path in module_paths]
                for name in (public, raw):
                    for path in module_paths:
                        full = _join(path, name)
                        self._named[full] = id(parameter)
                        self._named.setdefault(_plain(full), id(parameter))
                if hits := [pattern for pattern in wanted if fnmatchcase(public, pattern)]:
                    matched.update((kind, hit) for hit in hits)
                    if parameter.dtype in DTYPES:
                        entry.prunable = True
                    else:
                        self._passed_over.append(f"{entry.names[0]} {obstacle(parameter)}")
        for key, module in unmatched.items():
            if key not in matched:
                names = sorted(public for public, _, _ in named_parameters(module))
                raise ValueError(
                    f"prunable: {key[1]!r} matches no tensor of {key[0].__name__}, which has "
                    f"{', '.join(names) or 'none'}"
                )
        order = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        prunable = sorted((k for k, e in found.items() if e.prunable), key=order.__getitem__)
        return {key: found[key] for key in prunable}

    def select(self, selector: Selector, argument: str) -> set[int]:
        """The ids of the prunable tensors that `selector` names.

        Raises:
            ValueError: If nothing in the model goes by it, prunable or not.
        """
        if isinstance(selector, nn.Module):
            module = unwrap(selector)
            if all(module is not other for other in self._modules.values()):
                raise ValueError(
                    f"{argument}: {_shown(selector)} is not a module of this model; pass one of "
                    "model.modules(), or its name"
                )
            return self._below(module)
        if isinstance(selector, Tensor):
            if id(selector) not in self._all:
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
        chosen, known = self._by_name(selector)
        if not known:
            raise ValueError(
                f"{argument}: {selector!r} matches no module or parameter of this model; see "
                "model.named_modules() for its names"
            )
        return chosen

    def _by_name(self, selector: str) -> tuple[set[int], bool]:
        if selector in self._modules:
            return self._below(self._modules[selector]), True
        if selector in self._named:
            return {self._named[selector]} & self.prunable.keys(), True
        if not any(character in selector for character in "*?["):
            return set(), False
        modules = {m for name, m in self._modules.items() if fnmatchcase(name, selector)}
        keys = {key for name, key in self._named.items() if fnmatchcase(name, selector)}
        chosen = keys & self.prunable.keys()
        for module in modules:
            chosen |= self._below(module)
        return chosen, bool(modules or keys)

    def _below(self, module: nn.Module) -> set[int]:
        return {id(parameter) for parameter in module.parameters()} & self.prunable.keys()

    def assign(self, groups: Groups) -> dict[int, str]:
        """Which prunable tensors, by id, the user puts into which group.

        Raises:
            ValueError: If a group matches nothing, or two match the same tensor.
        """
        chosen: dict[int, tuple[str, Selector]] = {}
        for group, selectors in groups.items():
            argument = f"groups[{group!r}]"
            count = 0
            for selector in _listed(selectors, argument):
                for key in self.select(selector, argument):
                    count += 1
                    other, by = chosen.setdefault(key, (group, selector))
                    if other != group:
                        raise ValueError(
                            f"groups: {other!r} (by {_shown(by)}) and {group!r} (by "
                            f"{_shown(selector)}) both match {self._shared_name(key)}; leave it "
                            "to one of them"
                        )
            if not count:
                raise ValueError(
                    f"{argument} = {_shown(selectors)} matches no prunable tensor"
                    f"{self._others()}; leave the group out, or see prunable= and exclude="
                )
        return {key: group for key, (group, _) in chosen.items()}

    def _others(self) -> str:
        """What was passed over and why, for an error."""
        return f" (for one, {self._passed_over[0]})" if self._passed_over else ""

    def _shared_name(self, key: int) -> str:
        name, *others = self.prunable[key].names
        return f"{name!r} (tied to {', '.join(map(repr, others))})" if others else repr(name)


def _listed(selectors: Selectors, argument: str) -> list[Selector]:
    # Modules such as Sequential, and tensors, are iterable too.
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


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def _shown(selector: object) -> str:
    if isinstance(selector, nn.Module):
        return f"the {type(selector).__name__} module"
    if isinstance(selector, Tensor):
        return f"the parameter of shape {tuple(selector.shape)}"
    if isinstance(selector, list | tuple):
        return f"[{', '.join(map(_shown, selector))}]"
    return repr(selector)
