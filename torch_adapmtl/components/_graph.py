"""Following an autograd graph from outputs to the leaf tensors that they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["leaf_masks"]


def leaf_masks(outputs: Sequence[Sequence[Tensor]]) -> dict[int, int]:
    """Return which leaf tensors each output depends on.

    Args:
        outputs: For each output the tensors that it consists of.

    Returns:
        For each leaf tensor that an output depends on, by id: a bit mask in which bit `i` is set if
        `outputs[i]` depends on it. The graph is walked once, whatever the number of outputs.
    """
    # Autograd makes a node's Python object anew at each access, unless one is alive: keep them.
    masks: dict[Any, int] = {}
    leaves: dict[int, int] = {}
    for bit, tensors in enumerate(outputs):
        for tensor in tensors:
            if tensor.grad_fn is not None:
                masks[tensor.grad_fn] = masks.get(tensor.grad_fn, 0) | 1 << bit
            elif tensor.requires_grad:
                leaves[id(tensor)] = leaves.get(id(tensor), 0) | 1 << bit
    for node in _topological_order(list(masks)):
        mask = masks[node]
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] = masks.get(child, 0) | mask
        if not node.next_functions:  # an AccumulateGrad node, which has the leaf as its variable
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                leaves[id(variable)] = leaves.get(id(variable), 0) | mask
    return leaves


def _topological_order(roots: Iterable[Any]) -> list[Any]:
    """Return `roots` and all nodes behind them, each after every node that leads to it.

    Iterative, because the graphs of deep models overflow recursion.
    """
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False) for root in roots]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend(
                (child, False)
                for child, _ in node.next_functions
                if child is not None and child not in seen
            )
    order.reverse()
    return order
