"""Copies and files of a `torch.fx.GraphModule` that contain its pruner.

A `GraphModule` drops the submodules that its graph does not call when it is copied, loaded or
cleaned up. Each `GraphModule` has a class of its own, so that this can be changed for one of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

__all__ = ["is_graph", "keep_pruner", "let_pruner_go"]

_NAME = "adapmtl"


def is_graph(model: nn.Module) -> bool:
    """Whether a model is a `GraphModule`."""
    return isinstance(model, GraphModule)


def keep_pruner(model: nn.Module) -> None:
    """Let copies and files of a `GraphModule` contain its submodule `adapmtl`."""
    kind: Any = type(model)
    kind.__reduce__, kind.__deepcopy__ = _reduce, _deepcopy
    kind.delete_all_unused_submodules = _delete_all_unused_submodules


def let_pruner_go(model: nn.Module) -> None:
    """Undo `keep_pruner`."""
    for name in ("__reduce__", "__deepcopy__", "delete_all_unused_submodules"):
        if name in vars(type(model)):
            delattr(type(model), name)


def _reduce(self: GraphModule) -> tuple[Any, ...]:
    rebuild, (body, imports) = GraphModule.__reduce__(self)
    modules = {name: child for name, child in self._modules.items() if name != _NAME}
    # A hook of `guard` refers to the model, which cannot contain itself; `_rebuild` adds it again.
    body = {**body, "_modules": modules, "_load_state_dict_pre_hooks": OrderedDict()}
    return _rebuild, (rebuild, body, imports, self._modules[_NAME])


def _rebuild(
    rebuild: Callable[..., nn.Module], body: Mapping[str, Any], imports: str, pruner: nn.Module
) -> nn.Module:
    from torch_adapmtl.run.checkpoint import guard

    model = rebuild(body, imports)
    _put(model, pruner)
    layers: Any = pruner.layers
    guard(model, layers)
    return model


def _deepcopy(self: GraphModule, memo: dict[int, Any]) -> GraphModule:
    copied: GraphModule = GraphModule.__deepcopy__(self, memo)
    _put(copied, memo[id(self._modules[_NAME])])
    return copied


def _put(model: nn.Module, pruner: nn.Module) -> None:
    pruner.__dict__["_model"] = model
    model._modules[_NAME] = pruner
    keep_pruner(model)


def _delete_all_unused_submodules(self: GraphModule) -> None:
    pruner = self._modules[_NAME]
    GraphModule.delete_all_unused_submodules(self)
    self._modules[_NAME] = pruner
