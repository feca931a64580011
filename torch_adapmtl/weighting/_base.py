"""The base class of all loss weightings, and checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from torch_adapmtl._checks import check_keys, check_numbers
from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.weighting._record import LossRecord

__all__ = ["LossWeighting", "check_names", "check_tasks", "check_weight"]


class LossWeighting(KeepsPrecision, ABC):
    """Weighted sum of task losses; the base class of all weightings.

    A subclass defines `weights`. If the weights depend on past losses, it stores these in
    `observe`, in buffers, so that they follow the model through `to`, `state_dict`, `deepcopy` and
    pickling. Floating-point buffers keep their dtype when the model is cast with `half`, `bfloat16`
    or `double`.

    Calling a weighting returns `sum_t weight_t * loss_t` over the tasks that have a loss, on the
    device of its buffers and in float32 or wider:

    - A task that is absent, or whose loss is None, is skipped, and nothing is stored for it.
    - A loss of exactly 0 says that the batch has no labels for the task, as a masked mean or
      `0 * output.sum()` does. It is part of the sum, so that the graph reaches the parameters of
      the task, but nothing is stored for it either. (Nor for a hinge loss that reaches 0, which
      has no gradient.)
    - Losses are stored only in training mode with gradients enabled. Calls under `no_grad` or in
      `eval` mode change nothing.
    - A NaN or infinite loss is never stored, but it is part of the returned sum, so that a gradient
      scaler or an anomaly check can detect it. It is counted, and `check_finite` raises an error
      that names the task.

    Args:
        tasks: The task names, without duplicates.
        strict: Raise an error at once for a NaN or infinite loss. This waits for the device on
            every call.

    Attributes:
        tasks: The task names, in order.
        record: The record of the losses of the run.
        synchronize: Whether processes that train together (torch.distributed is initialised)
            average their losses, so that their weights are the same. True by default. All processes
            must then call the weighting equally often.

    Example:
        >>> import torch
        >>> from torch_adapmtl import LossWeighting
        >>> class Warmup(LossWeighting):  # the second task starts at 0
        ...     def weights(self):
        ...         return torch.tensor([2.0, 0.0], device=self.device)
        >>> weighting = Warmup(["seg", "depth"])
        >>> weighting({"seg": torch.tensor(3.0), "depth": torch.tensor(5.0)})
        tensor(6.)
    """

    synchronize = True

    def __init__(self, tasks: Sequence[str], *, strict: bool = False) -> None:
        super().__init__()
        self.tasks = check_tasks(tasks)
        self.strict = strict
        self.record = LossRecord(self.tasks)

    @property
    def device(self) -> torch.device:
        """Device of the buffers, of the weights and of the returned sum."""
        return self.record.nonfinite.device

    @abstractmethod
    def weights(self) -> Tensor:
        """Return the weight of each task: a new detached tensor of shape (T,), as in `tasks`."""

    def observe(self, losses: Tensor, accepted: Tensor) -> None:
        """Store the losses of one training step; the base class stores nothing.

        Args:
            losses: Detached float32 losses of shape (T,); arbitrary where not accepted.
            accepted: Bool of shape (T,): whether the task has a loss, which is finite and not 0.
        """

    def config(self) -> dict[str, Any]:
        """Return the settings that decide the weights, as values that JSON can hold.

        A checkpoint stores the config, and a state dict is loaded only into a run with an equal
        config. The base class returns the name of the class; a subclass adds its settings.
        """
        return {"name": type(self).__name__}

    def forward(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Return the weighted sum of the losses.

        Args:
            losses: A 0-d floating-point tensor for each task. A task that is absent or None is
                skipped.

        Raises:
            TypeError: If `losses` is not a mapping, or a loss is not a floating-point tensor.
            ValueError: If a task is unknown, a loss is not a scalar, or there is no loss.
            RuntimeError: If `strict` and a loss is NaN or infinite.
        """
        return self.weigh(self.record.check(losses))

    def weigh(self, present: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of losses that `record.check` has returned."""
        learning = self.training and torch.is_grad_enabled()
        stacked = self.record.stack(present)
        if self.strict:
            nonfinite = (~stacked.detach().isfinite()).long()
            self.record.raise_nonfinite(nonfinite, synchronize=self.synchronize and learning)
        if learning:
            self.observe(*self.record.count(stacked, synchronize=self.synchronize))
        return (self._weights_for(present, stacked) * stacked).sum()

    def check_finite(self) -> None:
        """Raise an error if a loss was NaN or infinite since the last check, and reset the counts.

        This waits for the device, so call it rarely.

        Raises:
            RuntimeError: If there was such a loss; it names the tasks and how often it happened.
        """
        self.record.raise_nonfinite(synchronize=self.synchronize)

    def unseen(self) -> dict[str, int]:
        """Return the tasks without a loss for longer than their window, and for how many steps.

        Reads the numbers from the device. The base class has no window and returns an empty dict.
        """
        return {}

    def as_dict(self) -> dict[str, float]:
        """Return the current weights by task as floats; this waits for the device.

        Example:
            >>> from torch_adapmtl import EqualWeighting
            >>> EqualWeighting(["seg", "depth"]).as_dict()
            {'seg': 1.0, 'depth': 1.0}
        """
        return dict(zip(self.tasks, self.weights().tolist(), strict=True))

    def extra_repr(self) -> str:
        """Show the tasks in the module's repr."""
        return f"tasks={list(self.tasks)}"

    def _weights_for(self, present: Mapping[str, Tensor], stacked: Tensor) -> Tensor:
        return self.weights()


def check_tasks(tasks: object) -> tuple[str, ...]:
    """Return the task names if there is at least one, all are strings, and none occurs twice."""
    names = tuple(tasks) if isinstance(tasks, Iterable) else (tasks,)
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in names):
        raise TypeError(f"tasks must be a sequence of task names (strings), got {tasks!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name at least one task and each once, got {list(names)}")
    return names


def check_names(name: str, weights: Mapping[str, object], tasks: tuple[str, ...]) -> None:
    """Raise an error unless the keys of `weights` are exactly the `tasks`."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping from task to weight, got {weights!r}")
    check_keys(name, weights, "tasks", tasks)


def check_weight(name: str, weight: object) -> None:
    """Raise an error unless `weight` is a finite number and not negative."""
    check_numbers(**{name: weight})
    if not 0 <= cast(float, weight) < inf:
        raise ValueError(f"{name} must be finite and not negative, got {weight}")
