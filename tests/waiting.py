"""A context in which nothing may be read off the device, or also nothing may wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = frozenset({"_local_scalar_dense", "item", "equal", "is_nonzero"})
# Of these, the sizes depend on values.
WAITS = frozenset(
    {
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "bincount",
        "repeat_interleave",
        "mask index",
    }
)


class _Refuse(TorchDispatchMode):
    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.names, name
        if "index" in name and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in tree_leaves(args[1])
        ):
            assert "mask index" not in self.names, name
        assert name != "_to_copy" or "device" not in (kwargs or {}), "moved to another device"
        return func(*args, **(kwargs or {}))


@contextmanager
def refused(names: frozenset[str] = READS | WAITS) -> Iterator[None]:
    """Raises an AssertionError where a value is read on the host, or an operator is called."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("read on the host")

    with pytest.MonkeyPatch.context() as patch, _Refuse(names):
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        yield
