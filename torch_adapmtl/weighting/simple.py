"""Simple loss weightings: fixed, equal, and computed by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.weighting._base import (
    LossWeighting,
    check_names,
    check_tasks,
    check_weight,
)

__all__ = [
    "CallableWeighting",
    "EqualWeighting",
    "FixedWeighting",
    "WeightFunction",
]

WeightFunction = Callable[[dict[str, Tensor]], Mapping[str, Tensor | float]]
"""From ``{task: loss}`` to ``{task: weight}``."""


class FixedWeighting(LossWeighting):
    """Gives every task a constant weight, scaled so that the weights sum to T.

    Args:
        tasks: The task names, without duplicates.
        weights: A finite weight >= 0 for every task, not all zero; only their ratios matter.
        strict: See `LossWeighting`.

    Raises:
        ValueError: If a task is missing or unknown, or a weight is out of range.

    Example:
        >>> FixedWeighting(["seg", "depth"], {"seg": 1, "depth": 3}).as_dict()
        {'seg': 0.5, 'depth': 1.5}
    """

    fixed: Tensor

    def __init__(
        self, tasks: Sequence[str], weights: Mapping[str, float], *, strict: bool = False
    ) -> None:
        super().__init__(tasks, strict=strict)
        check_names("weights", weights, self.tasks)
        for task in self.tasks:
            check_weight(f"weights[{task!r}]", weights[task])
        largest = max(float(weights[task]) for task in self.tasks)
        if largest == 0:
            raise ValueError("weights are all 0; give at least one task a positive weight")
        fixed = torch.tensor(
            [float(weights[task]) / largest for task in self.tasks], dtype=torch.float64
        )
        fixed *= len(self.tasks) / fixed.sum()
        self._by_task = dict(zip(self.tasks, fixed.float().tolist(), strict=True))
        self.register_buffer("fixed", fixed.float(), persistent=False)

    def weights(self) -> Tensor:
        """The weights, float32 of shape (T,)."""
        return self.fixed.clone()

    def config(self) -> dict[str, Any]:
        """Return the weights, scaled to sum to T, by task."""
        return {"name": "FixedWeighting", "weights": dict(self._by_task)}


class EqualWeighting(FixedWeighting):
    """Gives every task the weight 1: the plain sum of the losses.

    Args:
        tasks: The task names, without duplicates.
        strict: See `LossWeighting`.

    Example:
        >>> import torch
        >>> from torch_adapmtl import EqualWeighting
        >>> EqualWeighting(["seg", "depth"])({"seg": torch.tensor(3.0), "depth": None})
        tensor(3.)
    """

    def __init__(self, tasks: Sequence[str], *, strict: bool = False) -> None:
        super().__init__(tasks, dict.fromkeys(check_tasks(tasks), 1.0), strict=strict)


class CallableWeighting(LossWeighting):
    """Computes the weights by a function of the losses.

    The function is called in every mode, with the losses of all tasks that have one. The losses
    have their graph, so the function can compute gradients. The weights that it returns are
    detached. By default they are scaled to sum to the number of tasks that have a loss, unless
    their sum is not positive; with ``normalize=False`` they are used as returned. Weights that are
    floats are checked. Weights that are tensors are not, because that would wait for the device.

    A loss of exactly 0 (no labels in the batch) is among the losses that the function gets, but the
    weight that it returns for that task is not used: the task keeps its former weight, and the
    weights of the other tasks are scaled to sum to their number.

    Args:
        tasks: The task names, without duplicates.
        fn: From ``{task: loss}`` to ``{task: weight}`` for the same tasks; a weight is a float
            or a 0-d tensor. To pickle the model, `fn` must be picklable, which a lambda is not.
        normalize: Whether to scale the weights.
        strict: See `LossWeighting`.

    Attributes:
        last: The weights of the last call, float32 of shape (T,); not part of the state dict.

    Raises:
        TypeError: If `fn` is not callable. In a call, if a weight is neither a number nor a tensor.
        ValueError: In a call, if the tasks of the weights and the losses differ, or a weight is out
            of range.

    Example:
        >>> def inverse(losses):
        ...     return {task: 1 / loss for task, loss in losses.items()}
        >>> weighting = CallableWeighting(["seg", "depth"], inverse)
        >>> weighting({"seg": torch.tensor(1.0), "depth": torch.tensor(3.0)})
        tensor(3.)
        >>> weighting.as_dict()
        {'seg': 1.5, 'depth': 0.5}
    """

    last: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        fn: WeightFunction,
        *,
        normalize: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__(tasks, strict=strict)
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        self.fn = fn
        self.normalize = normalize
        self.register_buffer("last", torch.ones(len(self.tasks)), persistent=False)

    def weights(self) -> Tensor:
        """The weights of the last call, float32 of shape (T,); 1 before the first call."""
        return self.last.clone()

    def config(self) -> dict[str, Any]:
        """Return the settings; functions are compared by their name."""
        name = getattr(self.fn, "__qualname__", type(self.fn).__qualname__)
        return {**super().config(), "function": name, "normalize": self.normalize}

    def _weights_for(self, present: Mapping[str, Tensor], stacked: Tensor) -> Tensor:
        returned = self.fn(dict(present))
        check_names("the weights returned by fn", returned, tuple(present))
        before = self.last.unbind()
        weights = torch.stack(
            [
                self._to_weight(task, returned[task]) if task in present else before[index]
                for index, task in enumerate(self.tasks)
            ]
        )
        observed = stacked.detach() != 0  # a missing task is 0 too
        if self.normalize:
            total = weights.masked_fill(~observed, 0).sum()
            weights = weights * (observed.sum() / total).masked_fill(total <= 0, 1)
        self.last = torch.where(observed, weights, self.last)
        return self.weights()

    def _to_weight(self, task: str, weight: Tensor | float) -> Tensor:
        name = f"the weight of {task!r} returned by fn"
        if isinstance(weight, Tensor):
            if weight.ndim:
                raise ValueError(f"{name} must be a scalar, got shape {tuple(weight.shape)}")
            return weight.detach().to(device=self.device, dtype=torch.float32)
        check_weight(name, weight)
        return torch.full((), float(weight), device=self.device)
