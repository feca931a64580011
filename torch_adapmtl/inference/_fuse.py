"""Layers of a traced model and what follows them, as one module each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ._fused_layer import FusedLayer
from ._layers import SparseLinear
from ._map_modules import Norm
from ._maps_in_graphs import leave_maps, use_maps
from ._nodes import (
    ADD,
    CONVOLUTIONS,
    PURE,
    activation_of,
    erase,
    is_layer,
    module_of,
    norm_of,
    only_user,
    writes,
)
from ._trace import is_plain

_NOTHING = ("dropout", "stochastic_depth", "drop_path")  # functions that do nothing in evaluation


def fuse_layers(module: nn.Module) -> nn.Module:
    """Replace each layer by a fused one, with what follows it where a graph shows that.

    Weights of layers change where a batch norm is folded in: `module` must be a copy.
    """
    names = {id(part): name for name, part in module.named_modules()}
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):
            prefix = names[id(part)]
            _fuse(part, prefix + "." if prefix else "")
    if is_layer(module):
        return FusedLayer(module, "")
    inner = {id(part.dense) for part in module.modules() if isinstance(part, FusedLayer)}
    done: dict[int, FusedLayer] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if is_layer(part) and id(part) not in inner:
            module.set_submodule(name, done.setdefault(id(part), FusedLayer(part, name)))
    _mark(module)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            leave_maps(part)
    return module


def _mark(module: nn.Module) -> None:
    """Note which layers only graphs call."""
    called: dict[int, int] = {}
    for graph in module.modules():
        if isinstance(graph, fx.GraphModule):
            names = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
            for name in names:
                key = id(graph.get_submodule(name))
                called[key] = called.get(key, 0) + 1
    found = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for part in module.modules():
        if isinstance(part, FusedLayer):
            part.in_graph = called.get(id(part), 0) == found[id(part)]


def link(model: nn.Module) -> None:
    """Let a sparse linear layer hand its map to linear layers that follow, if all are sparse."""
    users: dict[FusedLayer, list[nn.Module | None]] = {}
    for graph in model.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            layer = module_of(graph, node)
            if isinstance(layer, FusedLayer) and isinstance(layer.sparse, SparseLinear):
                users.setdefault(layer, []).extend(module_of(graph, user) for user in node.users)
    for layer, found in users.items():
        assert isinstance(layer.sparse, SparseLinear)
        layer.sparse.keeps_map = layer.in_graph and all(
            isinstance(user, FusedLayer)
            and user.choice == "sparse"
            and isinstance(user.sparse, SparseLinear)
            for user in found
        )


def _fuse(graph: fx.GraphModule, prefix: str) -> None:
    _drop_what_does_nothing(graph)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    calls = Counter(str(node.target) for node in order if node.op == "call_module")
    appearances = Counter(id(part) for _, part in graph.named_modules(remove_duplicate=False))
    for node in list(order):
        dense = module_of(graph, node)
        if dense is None or not is_layer(dense) or len(node.args) != 1 or node.kwargs:
            continue
        name = str(node.target)
        if calls[name] > 1 or appearances[id(dense)] > 1:
            continue  # what follows differs from call to call
        fused, residual, activation = [node], None, None
        following = only_user(node)
        norm = norm_of(graph, following) if _takes_norm(dense) else None
        if following is not None and norm is not None and following.args[0] is node:
            _fold(dense, norm)
            fused.append(following)
            following = only_user(following)
        if following is not None and isinstance(dense, nn.Conv2d):
            other = _other(following, fused[-1])
            if other is not None and _can_move(graph, order, node, following):
                fused.append(following)
                residual, following = other, only_user(following)
        if following is not None and following.args[:1] == (fused[-1],):
            activation = activation_of(graph, following)
            if activation is not None:
                fused.append(following)
        graph.set_submodule(name, FusedLayer(dense, prefix + name, activation))
        place = node if residual is None else fused[-1]  # not after what writes to the input
        with graph.graph.inserting_before(place):
            args = (node.args[0],) if residual is None else (node.args[0], residual)
            new = graph.graph.call_module(name, args)
        order[new] = order[place]
        fused[-1].replace_all_uses_with(new)
        for part in reversed(fused):
            erase(graph, part)
    use_maps(graph)
    graph.recompile()


def _drop_what_does_nothing(graph: fx.GraphModule) -> None:
    """Drop dropout, stochastic depth and identities, and assertions: they held for the examples."""
    for node in list(graph.graph.nodes):
        module = module_of(graph, node)
        nothing = type(module) in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d) and (
            is_plain(module)
        )
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _NOTHING:
            flags = (*node.args[1:], *node.kwargs.values())
            nothing = any(flag is False for flag in flags) and True not in flags
        if nothing and node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is torch._assert and not _checks_an_argument(node):
            erase(graph, node)
    for node in reversed(graph.graph.nodes):  # such as what an assertion's text would have shown
        if not node.users and node.op == "call_function" and node.target in PURE:
            erase(graph, node)


def _checks_an_argument(node: fx.Node) -> bool:
    """Whether an assertion compares an argument with what the graph was specialised for."""
    condition = node.args[0]
    return isinstance(condition, fx.Node) and any(
        given.op == "placeholder" for given in condition.all_input_nodes
    )


def _takes_norm(layer: nn.Module) -> bool:
    """Whether torch's function can fold a batch norm into a layer."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.groups == 1
    return isinstance(layer, CONVOLUTIONS)


def _fold(layer: Any, norm: Norm) -> None:
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight,
        layer.bias,
        norm.mean,
        norm.variance,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=isinstance(layer, nn.ConvTranspose2d),
    )
    layer.requires_grad_(False)


def _other(node: fx.Node, result: fx.Node) -> fx.Node | None:
    """What `node` adds to `result`, if that is one other tensor."""
    adds = node.target in (ADD if node.op == "call_function" else ("add", "add_"))
    if not adds or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is result else first
    is_computed = isinstance(other, fx.Node) and other is not result and other.op != "get_attr"
    return other if is_computed and isinstance(other, fx.Node) else None


def _can_move(
    graph: fx.GraphModule, order: dict[fx.Node, int], start: fx.Node, end: fx.Node
) -> bool:
    """Whether a layer can run where its result is used: nothing in between writes to its input."""
    between = (node for node in graph.graph.nodes if order[start] < order[node] < order[end])
    return not any(writes(graph, node) for node in between)
