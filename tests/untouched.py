"""Everything that can be seen of a model, to tell whether something has touched it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def picture(value: Any, depth: int = 0) -> Any:
    """What can be compared of a value: identity and contents of tensors, contents of the rest."""
    if depth > 8:
        return None  # it contains itself
    if isinstance(value, Tensor):
        return "tensor", type(value), id(value), value.requires_grad, _contents(value)
    if isinstance(value, dict):
        return "dict", id(value), [(k, picture(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | deque):
        return type(value), id(value), [picture(v, depth + 1) for v in value]
    if isinstance(value, nn.Module):
        return "module", type(value), id(value)
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if depth < 3 and hasattr(value, "__dict__") and not isinstance(value, type):
        return "object", id(value), picture(vars(value), depth + 1)
    return "other", id(value)


def _contents(tensor: Tensor) -> Any:
    if is_lazy(tensor):
        return "lazy"
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return tensor.dtype, tensor.device
    place = tensor.data_ptr() if tensor.layout == torch.strided else 0
    plain = tensor.detach().clone()
    if tensor.is_quantized:
        plain = plain.int_repr()
    elif tensor.layout != torch.strided:
        plain = plain.to_dense()
    bits = plain.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tensor.layout, place, tensor.shape, bits.tolist()


def state(model: nn.Module, ignored: Collection[str] = ()) -> Any:
    """A picture of a model and of the random number generators.

    Args:
        model: The model; its modules' attributes (among them parameters, buffers, hooks, training
            flags), and its parameters' gradients and hooks are in the picture.
        ignored: Names of buffers and attributes to leave out, in any module.
    """
    modules = []
    for name, module in model.named_modules():
        seen = dict(vars(module))
        seen["_buffers"] = {k: v for k, v in module._buffers.items() if k not in ignored}
        left_out = {"_buffers", *ignored}
        described = [(key, picture(value)) for key, value in seen.items() if key not in left_out]
        buffers = [(key, picture(value)) for key, value in seen["_buffers"].items()]
        modules.append((name, type(module), described, buffers))
    parameters = [
        (
            name,
            picture(p),
            picture(p.grad),
            p.requires_grad,
            list(p._backward_hooks or ()),
            list(p._post_accumulate_grad_hooks or ()),
        )
        for name, p in model.named_parameters()
    ]
    generators = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],
        [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else 0,
    )
    return modules, parameters, generators


def assert_untouched(
    model: nn.Module, run: Callable[[], object], ignored: Collection[str] = ()
) -> None:
    """Run something and check that it leaves no trace on the model."""
    before = state(model, ignored)
    run()
    after = state(model, ignored)
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert new == old
    assert after == before
