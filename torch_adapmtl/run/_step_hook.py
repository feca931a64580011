"""A hook that calls a function after each step of an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.layers.optimizer_hooks import running_steps

__all__ = ["StepHook"]


class StepHook:
    """Calls a function after each step of an optimiser, and counts the steps that were skipped.

    A gradient scaler skips a step whose gradients overflow. With a fused optimiser, the step itself
    is called, and the optimiser skips it on the device.

    Args:
        optimizer: The optimiser, or a wrapper that holds it in the attribute `optimizer`.
        function: The function to call.

    Raises:
        TypeError: If `optimizer` is not an optimiser.
    """

    def __init__(self, optimizer: object, function: Callable[[], None]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}; "
                f"pass the one that trains the model"
            )
        inner: Any = optimizer
        while "_optimizer_step_post_hooks" not in vars(inner) and hasattr(inner, "optimizer"):
            inner = inner.optimizer  # Accelerate's wrapper does not support hooks
        self._function = function
        self._skipped: Tensor | int = 0
        self._hook = inner.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling() and running_steps(optimizer) > 1:
            return  # this is the step of the base class, in that of the subclass
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        if skipped is not None:
            self._skipped = self._skipped + skipped.detach()
        self._function()

    def skipped(self) -> int:
        """Return how many steps a fused optimiser skipped since `reset`; waits for the device."""
        return int(self._skipped)

    def reset(self) -> None:
        """Set the number of skipped steps to 0."""
        self._skipped = 0

    def remove(self) -> None:
        """Stop calling the function."""
        self._hook.remove()
