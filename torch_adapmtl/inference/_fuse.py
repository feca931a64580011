"""Layers of a traced model and what follows them, as one module each."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import _elementwise
from ._fused_layer import FusedLayer
from ._layers import SparseLinear
from ._map_modules import (
    MapActivation,
    MapMaxPool2d,
    MapMean,
    MapNorm2d,
    MapUpsample,
    Norm,
)
from ._maps import contiguous
from ._trace import is_plain

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ZERO_TO_ZERO = (
    nn.ReLU,
    nn.Hardtanh,  # and ReLU6
    nn.Hardswish,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
)
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardswish: nn.Hardswish,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.gelu: nn.GELU,
}
_ADD = (operator.add, operator.iadd, torch.add)
_NOTHING = ("dropout", "stochastic_depth", "drop_path")  # functions that do nothing in evaluation
_PURE = {getattr, operator.getitem, operator.eq, operator.le, operator.ge, operator.mod}
_PURE |= {operator.and_, operator.or_}
_IN_PLACE = {
    getattr(operator, f"i{name}")
    for name in [
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "lshift",
        "rshift",
        "and",
        "or",
        "xor",
    ]
} | {operator.setitem, operator.delitem}

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


def fuse_layers(module: nn.Module) -> nn.Module:
    """Replace each layer by a fused one, with what follows it where a graph shows that.

    Weights of layers change where a batch norm is folded in: `module` must be a copy.
    """
    names = {id(part): name for name, part in module.named_modules()}
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):
            prefix = names[id(part)]
            _fuse(part, prefix + "." if prefix else "")
    if _is_layer(module):
        return FusedLayer(module, "")
    inner = {id(part.dense) for part in module.modules() if isinstance(part, FusedLayer)}
    done: dict[int, FusedLayer] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if _is_layer(part) and id(part) not in inner:
            module.set_submodule(name, done.setdefault(id(part), FusedLayer(part, name)))
    _mark(module)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _leave_maps(part)
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
            layer = _module(graph, node)
            if isinstance(layer, FusedLayer) and isinstance(layer.sparse, SparseLinear):
                users.setdefault(layer, []).extend(_module(graph, user) for user in node.users)
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
        dense = _module(graph, node)
        if dense is None or not _is_layer(dense) or len(node.args) != 1 or node.kwargs:
            continue
        name = str(node.target)
        if calls[name] > 1 or appearances[id(dense)] > 1:
            continue  # what follows differs from call to call
        fused, residual, activation = [node], None, None
        following = _only_user(node)
        norm = _norm(graph, following) if isinstance(dense, _CONVOLUTIONS) else None
        if following is not None and norm is not None and following.args[0] is node:
            _fold(dense, norm)
            fused.append(following)
            following = _only_user(following)
        if following is not None and isinstance(dense, nn.Conv2d):
            other = _other(following, fused[-1])
            if other is not None and _can_move(graph, order, node, following):
                fused.append(following)
                residual, following = other, _only_user(following)
        if following is not None and following.args[:1] == (fused[-1],):
            activation = _activation(graph, following)
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
            _erase(graph, part)
    _use_maps(graph)
    graph.recompile()


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one of torch's layers, or of a subclass that computes the same."""
    for kind in _LAYERS:
        if isinstance(module, kind):
            given: Any = type(module)
            convolves = getattr(given, "_conv_forward", None)
            return (
                given.forward is kind.forward
                and convolves is getattr(kind, "_conv_forward", None)
                and is_plain(module)
            )
    return False


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _erase(graph: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node without users, and what was only computed for it."""
    inputs = node.all_input_nodes
    graph.graph.erase_node(node)
    for given in inputs:
        if not given.users and (given.op == "get_attr" or given.target in _PURE):
            _erase(graph, given)


def _drop_what_does_nothing(graph: fx.GraphModule) -> None:
    """Drop dropout, stochastic depth and identities, and assertions: they held for the examples."""
    for node in list(graph.graph.nodes):
        module = _module(graph, node)
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
            _erase(graph, node)
    for node in reversed(graph.graph.nodes):  # such as what an assertion's text would have shown
        if not node.users and node.op == "call_function" and node.target in _PURE:
            _erase(graph, node)


def _checks_an_argument(node: fx.Node) -> bool:
    """Whether an assertion compares an argument with what the graph was specialised for."""
    condition = node.args[0]
    return isinstance(condition, fx.Node) and any(
        given.op == "placeholder" for given in condition.all_input_nodes
    )


def _attribute(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor of the model that a node reads."""
    value: Any = None
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _norm(graph: fx.GraphModule, node: fx.Node | None) -> Norm | None:
    """The batch norm that a node applies to its first argument."""
    if node is None or not node.args:
        return None
    module = _module(graph, node)
    if isinstance(module, _NORMS):
        if type(module).forward is not nn.BatchNorm2d.forward or not is_plain(module):
            return None
        if module.running_mean is None or module.running_var is None:
            return None
        return Norm(module.running_mean, module.running_var, module.eps, module.weight, module.bias)
    if node.target is not F.batch_norm:
        return None
    names = [
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ]
    values: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mean, variance, weight, bias = (_attribute(graph, values.get(name)) for name in names[1:5])
    unknown = [
        name
        for name, value in (("weight", weight), ("bias", bias))
        if value is None and values.get(name) is not None
    ]
    if values.get("training", False) is not False or mean is None or variance is None or unknown:
        return None
    return Norm(mean, variance, values.get("eps", 1e-5), weight, bias)


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


def _maps_zero_to_zero(module: nn.Module | None) -> bool:
    if not isinstance(module, _ZERO_TO_ZERO) or not is_plain(module):
        return False
    if not type(module).__module__.startswith("torch.nn"):
        return False
    return not isinstance(module, nn.Hardtanh) or module.min_val <= 0 <= module.max_val


def _activation(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The activation that a node applies to its first argument."""
    module = _module(graph, node)
    if module is not None:
        if not _maps_zero_to_zero(module):
            return None
        own: Any = copy.copy(module)
        if hasattr(own, "inplace"):
            own.inplace = True  # what a layer returns is not used elsewhere
        return cast(nn.Module, own)
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return nn.ReLU(inplace=True)
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    extra = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if kind is None or len(node.args) > 2 or (extra and kind is not nn.GELU):
        return None
    return kind(**extra)


def _other(node: fx.Node, result: fx.Node) -> fx.Node | None:
    """What `node` adds to `result`, if that is one other tensor."""
    adds = node.target in (_ADD if node.op == "call_function" else ("add", "add_"))
    if not adds or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is result else first
    is_computed = isinstance(other, fx.Node) and other is not result and other.op != "get_attr"
    return other if is_computed and isinstance(other, fx.Node) else None


def _writes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_module":
        module = _module(graph, node)
        known = type(module).__module__.startswith(("torch.nn.", f"{__package__}."))
        return not known or bool(getattr(module, "inplace", False))
    return node.op == "call_function" and (
        node.target in _IN_PLACE
        or getattr(node.target, "__name__", "").endswith("_")
        or "out" in node.kwargs
        or any(value is True for value in (*node.args, *node.kwargs.values()))  # `inplace`
    )


def _can_move(
    graph: fx.GraphModule, order: dict[fx.Node, int], start: fx.Node, end: fx.Node
) -> bool:
    """Whether a layer can run where its result is used: nothing in between writes to its input."""
    between = (node for node in graph.graph.nodes if order[start] < order[node] < order[end])
    return not any(_writes(graph, node) for node in between)


def _use_maps(graph: fx.GraphModule) -> None:
    """Let what lies between layers work on maps as a whole."""
    for node in list(graph.graph.nodes):
        norm = _norm(graph, node)
        if norm is not None:
            _use_map_norm(graph, node, norm)
            continue
        module = _module(graph, node)
        if module is not None:
            replaced = _map_module(module)
            if replaced is not None:
                graph.set_submodule(str(node.target), replaced)
            continue
        if node.target is F.interpolate:
            _replace(graph, [node], "map_upsample", MapUpsample(), node.args, node.kwargs)
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
    fused, following = [node], _only_user(node)
    activation = None
    if following is not None and following.args[:1] == (node,):
        activation = _activation(graph, following)
        if activation is not None:
            fused.append(following)
    _replace(graph, fused, "map_norm", MapNorm2d(norm, activation), (node.args[0],), {})


def _replace(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    name: str,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> None:
    """Replace a chain of nodes by the call of a new module."""
    taken = {child for child, _ in graph.named_children()}
    name = next(f"{name}_{i}" for i in range(len(taken) + 1) if f"{name}_{i}" not in taken)
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(nodes[0]):  # not after what writes to the input
        new = graph.graph.call_module(name, args, kwargs)
    nodes[-1].replace_all_uses_with(new)
    for part in reversed(nodes):
        _erase(graph, part)


def _leave_maps(graph: fx.GraphModule) -> None:
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
    writes = any(_writes(graph, node) or _is_in_place(graph, node) for node in graph.graph.nodes)
    for node in makers:
        users = [user for user in node.users if writes or not _knows_maps(graph, user)]
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(contiguous, (node,))
            new.meta["is_wrapped"] = True
        for user in users:
            user.replace_input_with(node, new)
    graph.recompile()


def _makes_map(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = _module(graph, node)
    if isinstance(module, FusedLayer):
        return isinstance(module.dense, _CONVOLUTIONS)
    return node.target in _MAP_FUNCTIONS or isinstance(module, _MAP_MAKERS)


def _is_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node changes a map that others see, too."""
    module = _module(graph, node)
    return (
        isinstance(module, MapActivation)
        and bool(getattr(module.module, "inplace", False))
        and any(len(given.users) > 1 for given in node.all_input_nodes)
    )


def _knows_maps(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node takes maps, or computes the same however its inputs lie in memory."""
    module = _module(graph, node)
    if module is not None:
        return isinstance(module, _MAP_MODULES) or (
            type(module) in _ANY_STRIDES_MODULES and is_plain(module)
        )
    if node.op == "call_method":
        return node.target in _ANY_STRIDES_METHODS
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.target in _MAP_FUNCTIONS or node.target in _ANY_STRIDES_FUNCTIONS


def _map_module(module: nn.Module) -> nn.Module | None:
    if not is_plain(module):
        return None
    if type(module) is nn.Upsample:
        return MapUpsample(module)
    if _maps_zero_to_zero(module):
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
        if target in _ADD or target == "add":
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
