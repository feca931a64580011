"""What lies between the layers of a graph: on maps where it can be, without them elsewhere."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import _elementwise
from ._fused_layer import FusedLayer
from ._map_modules import (
    MapActivation,
    MapMaxPool2d,
    MapMean,
    MapNorm2d,
    MapUpsample,
    Norm,
)
from ._maps import contiguous
from ._nodes import (
    ADD,
    CONVOLUTIONS,
    activation_of,
    maps_zero_to_zero,
    module_of,
    norm_of,
    only_user,
    replace,
    writes,
)
from ._trace import is_plain

_MAP_FUNCTIONS = {
    _elementwise.add,
    _elementwise.multiply,
    _elementwise.mean,
    _elementwise.concatenate,
}

_MAP_MAKERS = (MapActivation, MapMaxPool2d, MapNorm2d, MapUpsample)

_MAP_MODULES = (FusedLayer, MapMean, *_MAP_MAKERS)

# These return new tensors that have no gaps, and their channels in order, whatever they are given.
_ANY_STRIDES_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.Upsample,
)

_ANY_STRIDES_METHODS = ("mean", "size", "sum")

_ANY_STRIDES_FUNCTIONS = {
    torch.mean,
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.max_pool2d,
    F.interpolate,
}


def use_maps(graph: fx.GraphModule) -> None:
    """Let what lies between layers work on maps as a whole."""
    for node in list(graph.graph.nodes):
        norm = norm_of(graph, node)
        if norm is not None:
            _use_map_norm(graph, node, norm)
            continue
        module = module_of(graph, node)
        if module is not None:
            replaced = _map_module(module)
            if replaced is not None:
                graph.set_submodule(str(node.target), replaced)
            continue
        if node.target is F.interpolate:
            replace(graph, [node], "map_upsample", MapUpsample(), node.args, node.kwargs)
            continue
        found = _map_function(node)
        if found is not None:
            function, args, kwargs = found
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(function, args, kwargs)
                new.meta["is_wrapped"] = True  # else a pickle would hold what it does to proxies
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)


def _use_map_norm(graph: fx.GraphModule, node: fx.Node, norm: Norm) -> None:
    """Replace a batch norm that follows no layer, with the activation that follows it."""
    fused, following = [node], only_user(node)
    activation = None
    if following is not None and following.args[:1] == (node,):
        activation = activation_of(graph, following)
        if activation is not None:
            fused.append(following)
    replace(graph, fused, "map_norm", MapNorm2d(norm, activation), (node.args[0],), {})


def _map_module(module: nn.Module) -> nn.Module | None:
    if not is_plain(module):
        return None
    if type(module) is nn.Upsample:
        return MapUpsample(module)
    if maps_zero_to_zero(module):
        return MapActivation(module)
    if type(module) is nn.MaxPool2d and not module.ceil_mode and not module.return_indices:
        return MapMaxPool2d(module)
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return MapMean()
    return None


def _map_function(node: fx.Node) -> tuple[Any, Any, Any] | None:
    args, kwargs = node.args, dict(node.kwargs)
    target = node.target if node.op in ("call_function", "call_method") else None
    if target in (operator.iadd, operator.imul):
        changed = args[0]
        if (
            not isinstance(changed, fx.Node)
            or len(changed.users) > 1
            or changed.op != "call_module"
        ):
            return None  # others may see that it was changed
    if len(args) == 2 and not kwargs and all(isinstance(a, fx.Node) for a in args):
        if target in ADD or target == "add":
            return _elementwise.add, args, {}
        if target in (operator.mul, operator.imul, torch.mul, "mul"):
            return _elementwise.multiply, args, {}
    if target in ("mean", torch.mean) and len(args) == 2 and set(kwargs) <= {"keepdim"}:
        dims = args[1]
        if isinstance(dims, list | tuple) and list(dims) in ([2, 3], [-1, -2], [-2, -1]):
            return _elementwise.mean, args, kwargs
    if target in (torch.cat, torch.concat) and args and isinstance(args[0], list | tuple):
        dim = kwargs.pop("dim", args[1] if len(args) == 2 else 0)
        if dim == 1 and not kwargs:
            return _elementwise.concatenate, (list(args[0]),), {}
    return None


def leave_maps(graph: fx.GraphModule) -> None:
    """Let only what knows of maps see them: how a tensor lies in memory may matter to the rest.

    A view of it, for one, may be possible only if there are no gaps.
    """
    makers = [
        node
        for node in graph.graph.nodes
        if _makes_map(graph, node) and not all(_knows_maps(graph, user) for user in node.users)
    ]
    if not makers:
        return
    # What is written in place must be the same tensor for all.
    in_place = any(writes(graph, node) or _is_in_place(graph, node) for node in graph.graph.nodes)
    for node in makers:
        users = [user for user in node.users if in_place or not _knows_maps(graph, user)]
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(contiguous, (node,))
            new.meta["is_wrapped"] = True
        for user in users:
            user.replace_input_with(node, new)
    graph.recompile()


def _makes_map(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(graph, node)
    if isinstance(module, FusedLayer):
        return isinstance(module.dense, CONVOLUTIONS)
    return node.target in _MAP_FUNCTIONS or isinstance(module, _MAP_MAKERS)


def _is_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node changes a map that others see, too."""
    module = module_of(graph, node)
    return (
        isinstance(module, MapActivation)
        and bool(getattr(module.module, "inplace", False))
        and any(len(given.users) > 1 for given in node.all_input_nodes)
    )


def _knows_maps(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node takes maps, or computes the same however its inputs lie in memory."""
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, _MAP_MODULES) or (
            type(module) in _ANY_STRIDES_MODULES and is_plain(module)
        )
    if node.op == "call_method":
        return node.target in _ANY_STRIDES_METHODS
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.target in _MAP_FUNCTIONS or node.target in _ANY_STRIDES_FUNCTIONS
