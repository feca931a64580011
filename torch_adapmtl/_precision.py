"""A module whose tensors keep their dtype when the model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["KeepsPrecision"]


class KeepsPrecision(nn.Module):
    """A module whose tensors move to other devices with the model, but keep their dtype.

    Otherwise `model.half()` would round statistics or make them overflow.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
