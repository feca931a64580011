"""What the nodes of a graph compute."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._map_modules import (
    Norm,
)
from ._trace import is_plain

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)

_LAYERS = (*CONVOLUTIONS, nn.Linear)

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

ADD = (operator.add, operator.iadd, torch.add)

PURE = {getattr, operator.getitem, operator.eq, operator.le, operator.ge, operator.mod}

PURE |= {operator.and_, operator.or_}

IN_PLACE = {
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


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_layer(module: nn.Module) -> bool:
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


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses the result of this one, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase(graph: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node without users, and what was only computed for it."""
    inputs = node.all_input_nodes
    graph.graph.erase_node(node)
    for given in inputs:
        if not given.users and (given.op == "get_attr" or given.target in PURE):
            erase(graph, given)


def replace(
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
        erase(graph, part)


def attribute_of(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor of the model that a node reads."""
    value: Any = None
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def norm_of(graph: fx.GraphModule, node: fx.Node | None) -> Norm | None:
    """The batch norm that a node applies to its first argument."""
    if node is None or not node.args:
        return None
    module = module_of(graph, node)
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
    mean, variance, weight, bias = (attribute_of(graph, values.get(name)) for name in names[1:5])
    unknown = [
        name
        for name, value in (("weight", weight), ("bias", bias))
        if value is None and values.get(name) is not None
    ]
    if values.get("training", False) is not False or mean is None or variance is None or unknown:
        return None
    return Norm(mean, variance, values.get("eps", 1e-5), weight, bias)


def maps_zero_to_zero(module: nn.Module | None) -> bool:
    if not isinstance(module, _ZERO_TO_ZERO) or not is_plain(module):
        return False
    if not type(module).__module__.startswith("torch.nn"):
        return False
    return not isinstance(module, nn.Hardtanh) or module.min_val <= 0 <= module.max_val


def activation_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The activation that a node applies to its first argument."""
    module = module_of(graph, node)
    if module is not None:
        if not maps_zero_to_zero(module):
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


def writes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_module":
        module = module_of(graph, node)
        known = type(module).__module__.startswith(("torch.nn.", f"{__package__}."))
        return not known or bool(getattr(module, "inplace", False))
    return node.op == "call_function" and (
        node.target in IN_PLACE
        or getattr(node.target, "__name__", "").endswith("_")
        or "out" in node.kwargs
        or any(value is True for value in (*node.args, *node.kwargs.values()))  # `inplace`
    )
