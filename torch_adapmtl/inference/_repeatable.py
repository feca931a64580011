"""Which graphs can be repeated without their Python, and a part of a batch at a time."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import _elementwise
from ._fused_layer import FusedLayer
from ._map_modules import MapActivation, MapMaxPool2d, MapMean, MapNorm2d, MapUpsample
from ._maps import contiguous
from ._nodes import attribute_of, module_of
from ._trace import is_plain

_NO_TENSORS = ("numpy", "tolist", "data_ptr", "__array__")  # methods that torch does not show


def is_repeatable(module: nn.Module) -> bool:
    """Whether a model is a graph of what torch shows: its operations, and calls of kernels."""
    if not isinstance(module, fx.GraphModule):
        return False
    for node in module.graph.nodes:
        if node.op == "call_module":
            part = module_of(module, node)
            if isinstance(part, fx.GraphModule):
                known = is_repeatable(part)
            else:
                known = is_plain(part) and _is_known(type(part).__module__)
        elif node.op == "get_attr":
            known = attribute_of(module, node) is not None  # not the code of a scripted module
        elif node.op == "call_function":
            known = _is_known(getattr(node.target, "__module__", None) or "torch")
        else:
            known = node.target not in _NO_TENSORS
        if not known:
            return False
    return True


def _is_known(module: str) -> bool:
    package = module.partition(".")[0]
    return package in ("torch", "_operator", "operator", "math", "builtins") or module.startswith(
        __package__
    )


# These compute each image for itself, whatever their other arguments are.
_MODULES = (
    *(FusedLayer, MapActivation, MapMaxPool2d, MapMean, MapNorm2d, MapUpsample),
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Mish),
    *(nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Upsample, nn.GroupNorm),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)

_FUNCTIONS = {
    *(_elementwise.add, _elementwise.multiply, _elementwise.mean, _elementwise.concatenate),
    *(contiguous, operator.add, operator.iadd, operator.sub, operator.mul, operator.imul),
    *(torch.add, torch.mul, torch.relu, torch.sigmoid, torch.tanh),
    *(F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.mish, F.sigmoid, F.tanh),
    *(F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}

_METHODS = ("add", "add_", "mul", "relu", "relu_", "sigmoid", "tanh", "contiguous")


def keeps_images_apart(module: nn.Module) -> bool:
    """Whether a graph computes each image of a batch for itself, as convolutional nets do."""
    return isinstance(module, fx.GraphModule) and all(
        _keeps_apart(module, node) for node in module.graph.nodes
    )


def _keeps_apart(graph: fx.GraphModule, node: fx.Node) -> bool:
    part = module_of(graph, node)
    if part is not None:
        if isinstance(part, fx.GraphModule):
            return keeps_images_apart(part)
        return type(part) in _MODULES or (type(part) is nn.Flatten and part.start_dim == 1)
    if node.target in (torch.flatten, "flatten"):
        return bool(_start(node) == 1)
    if node.target is operator.getitem:
        return _is_size(node) or _is_size(node.args[0])
    if _is_shape(node):
        return True
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op in ("placeholder", "output")  # parameters may have any shape


_SPATIAL = (2, 3, -1, -2, slice(2, None), slice(-2, None))


def _start(node: fx.Node) -> Any:
    """The first dimension that is flattened."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)


def _is_size(node: Any) -> bool:
    """Whether a node is the height, the width, or both of a shape."""
    return (
        isinstance(node, fx.Node)
        and node.target is operator.getitem
        and _is_shape(node.args[0])
        and node.args[1] in _SPATIAL
    )


def _is_shape(node: Any) -> bool:
    """Whether a node is the shape of a tensor, and only its height and width are used."""
    if not isinstance(node, fx.Node):
        return False
    is_shape = bool(node.target is getattr and node.args[1] == "shape")
    is_size = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    return (is_shape or is_size) and all(user.target is operator.getitem for user in node.users)
