"""Being called by an optimiser after each of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Attachment"]


class Attachment:
    """Calls a function after each step of an optimiser, and counts those that were none.

    A gradient scaler leaves out the step where gradients overflow, or, if the optimiser is fused,
    lets the optimiser leave it out, which only the device knows.

    Args:
        optimizer: The optimiser, or a wrapper that keeps it as `optimizer`.
        function: What is called.

    Raises:
        TypeError: If `optimizer` is no optimiser.
    """

    def __init__(self, optimizer: object, function: Callable[[], None]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}; "
                f"pass the one that trains the model"
            )
        inner: Any = optimizer
        while "_optimizer_step_post_hooks" not in vars(inner) and hasattr(inner, "optimizer"):
            inner = inner.optimizer  # Accelerate's wrapper takes no hooks
        self._function = function
        self._skipped: Tensor | int = 0
        self._hook = inner.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        if skipped is not None:
            self._skipped = self._skipped + skipped.detach()
        self._function()

    def skipped(self) -> int:
        """How many calls were for steps that the optimiser left out; waits for the device."""
        return int(self._skipped)

    def settle(self) -> None:
        """Start counting anew."""
        self._skipped = 0

    def remove(self) -> None:
        """Call the function no more."""
        self._hook.remove()
