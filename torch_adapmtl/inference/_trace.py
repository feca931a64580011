"""A graph of a model, as far as ``torch.fx`` can follow it.

What it cannot follow stays a call of the module, whose own children are traced in turn.
"""

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn


class _Tracer(fx.Tracer):
    """Leaves a module as a call if tracing it fails, as where control flow depends on values."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        named = (*root.named_parameters(), *root.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As torch does it, but without a search through all parameters for each of them."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, nn.Parameter) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """As torch does it, but without a search through all tensors for each of them."""
        name = self._names.get(id(a)) if isinstance(a, torch.Tensor) else None
        return super().create_arg(a) if name is None else self.create_node("get_attr", name, (), {})

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def is_plain(module: nn.Module | None) -> bool:
    """Whether a call of the module does what its class says: no hooks, no forward of its own."""
    if module is None or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


class Calls:
    """Which parameters each module of a model is called with, on the examples."""

    def __init__(self, model: nn.Module) -> None:
        self.passed: dict[int, set[frozenset[str]]] = {}
        self.tensors_only: dict[int, bool] = {}
        self._handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True)
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        ]

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except TypeError:
            bound = {"": None}
        leaves = torch.utils._pytree.tree_leaves(list(bound.values()))
        key = id(module)
        self.passed.setdefault(key, set()).add(frozenset(bound))
        self.tensors_only[key] = self.tensors_only.get(key, True) and all(
            isinstance(x, torch.Tensor) for x in leaves
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def constants(self, module: nn.Module) -> dict[str, Any] | None:
        """Defaults of the parameters that are not passed; None if the calls differ."""
        ways = self.passed.get(id(module), set())
        if len(ways) != 1 or not self.tensors_only[id(module)]:
            return None
        (passed,) = ways
        parameters = inspect.signature(module.forward).parameters.values()
        if any(
            p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name in passed for p in parameters
        ):
            return None
        return {
            p.name: p.default
            for p in parameters
            if p.name not in passed and p.default is not p.empty
        }


def trace(model: nn.Module, calls: Calls, depth: int = 0) -> nn.Module:
    """A graph module for `model`, or `model` with its children traced if that fails.

    Modules that the graph calls are traced in turn. The first `depth` levels are left untraced.
    """
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module, level: int) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        result = module
        if next(module.children(), None) is not None:
            constants = calls.constants(module)
            if level >= depth and constants is not None and is_plain(module):
                try:
                    graph = _Tracer().trace(module, constants)
                    if not any(map(_writes_to_constant, graph.nodes)):
                        result = fx.GraphModule(module, graph, type(module).__name__)
                except Exception:  # whatever the model's own code raises when it meets a proxy
                    result = module
            done[id(module)] = result
            leaves = list(result.named_children()) if result is module else _called(result)
            for name, child in leaves:
                if _unopened(child):
                    parent, _, last = name.rpartition(".")
                    setattr(result.get_submodule(parent), last, visit(child, level + 1))
        return result

    return visit(model, 0)


def _writes_to_constant(node: fx.Node) -> bool:
    """Whether a node changes a tensor that the model makes anew in each call, and the graph not."""
    first = node.args[0] if node.args else None
    is_constant = isinstance(first, fx.Node) and "_tensor_constant" in str(first.target)
    name = str(getattr(node.target, "__name__", node.target))
    in_place = getattr(operator, name, None) is node.target and name[0] == "i"
    return is_constant and (in_place or name.endswith("_") or name == "setitem")


def _unopened(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and not isinstance(module, fx.GraphModule)


def _called(graph: nn.Module) -> list[tuple[str, nn.Module]]:
    assert isinstance(graph, fx.GraphModule)
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return [(name, graph.get_submodule(name)) for name in sorted(names)]
