"""Following an autograd graph from outputs to the leaf tensors behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["reached"]


def reached(outputs: Sequence[Sequence[Tensor]]) -> dict[int, int]:
    """Which leaf tensors the autograd graphs of `outputs` reach.

    Returns the id of each leaf that was reached, with a bit mask in which bit `i` is set where
    `outputs[i]` reaches it. One pass over the graph, whatever the number of outputs, and
    iterative: the graphs of deep models overflow recursion.
    """
    # The nodes are kept as keys: their Python objects, and so identity, last only while held.
    masks: dict[Any, int] = {}
    leaves: dict[int, int] = {}
    for bit, tensors in enumerate(outputs):
        for tensor in tensors:
            if tensor.grad_fn is not None:
                masks[tensor.grad_fn] = masks.get(tensor.grad_fn, 0) | 1 << bit
            elif tensor.requires_grad:
                leaves[id(tensor)] = leaves.get(id(tensor), 0) | 1 << bit
    for node in _from_the_outputs(masks):
        mask = masks[node]
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] = masks.get(child, 0) | mask
        if not node.next_functions:  # only AccumulateGrad has a variable and nothing behind it
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                leaves[id(variable)] = leaves.get(id(variable), 0) | mask
    return leaves


def _from_the_outputs(roots: Mapping[Any, int]) -> list[Any]:
    """All nodes behind `roots`, each after every node that leads to it."""
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
