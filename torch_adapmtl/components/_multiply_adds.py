"""Counting the multiply-adds that an operation makes with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["batch_size", "factors", "multiply_adds"]

_ADDED = frozenset(["addmm", "addmv", "addbmm", "baddbmm", "addr", "addcmul"])
_MATRICES = frozenset(
    ["mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "addbmm", "baddbmm", "_int_mm",
     "_scaled_mm"]
)  # fmt: skip
_RECURRENT = frozenset(["mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps"])
_LOOK_UPS = frozenset(["embedding", "embedding_bag", "_embedding_bag"])


def factors(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an operation without the one that it adds to a product."""
    return args[1:] if name.rstrip("_") in _ADDED else args


def multiply_adds(
    function: Any, args: tuple[Any, ...], out: Any, weight: Tensor, *, product: bool
) -> int | None:
    """Count the multiply-adds that an operation makes with a weight, over the whole batch.

    Args:
        function: The operation, with a schema.
        args: Its positional arguments.
        out: What it returned.
        weight: The weight, one of the arguments.
        product: Whether the operation is known to multiply more than entry by entry.

    Returns:
        The number. It is 0 for an operation that does not multiply, and None for a product whose
        multiply-adds are not known.
    """
    namespace, _, name = function._schema.name.partition("::")
    plain = name.rstrip("_")
    if name in ("convolution", "_convolution", "deform_conv2d"):
        x, kernel = args[:2]
        transposed = name != "deform_conv2d" and args[6]
        positions = x.shape[0] * prod((x if transposed else out).shape[2:])
        return int(positions * kernel.numel())
    if name in _MATRICES:
        a, b = factors(name, args)[:2]
        return int(a.numel() * (b.shape[-1] if b.ndim > 1 else 1))
    if name in _RECURRENT:
        return int(args[0].shape[:-1].numel() * weight.numel())
    if plain in ("mul", "addcmul", "addr"):
        return int(out.numel())
    unknown = product or namespace not in ("aten", "prims")
    return None if unknown and name not in _LOOK_UPS else 0


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of examples in the inputs of a model; 1 if there is no tensor.

    It is the length of the first tensor, or of a list of tensors that comes before it.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            return len(value)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return max(1, leaf.shape[0])
    return 1
