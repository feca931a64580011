"""The base of all loss weightings, and the checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from torch_adapmtl._checks import check_numbers
from torch_adapmtl._distributed import mean_over_processes, sum_over_processes
from torch_adapmtl._precision import KeepsPrecision

__all__ = [
    "LossWeighting",
    "check_names",
    "check_tasks",
    "check_weight",
]

# Losses are clamped to this inside the windows so that the difference of two stays finite.
_HUGE = torch.finfo(torch.float32).max / 4


class LossWeighting(KeepsPrecision, ABC):
    """Weighted sum of task losses; the base of all weightings.

    A subclass says what its weights are in `weights` and, if they depend on the past, remembers
    losses in `observe`. What it remembers belongs into buffers, so that it follows the model
    through ``to``, ``state_dict``, ``deepcopy`` and pickling. Floating-point buffers stay float32
    when the model is cast with ``half``, ``bfloat16`` or ``double``.

    Calling it returns ``sum_t weight_t * loss_t`` over the tasks present, on the device of its
    buffers and in float32 or wider:

    - A task that is absent, or whose loss is None, is skipped and nothing is remembered for it.
    - Losses are remembered only in training mode with gradients enabled, so evaluating under
      ``no_grad`` or in ``eval`` mode changes nothing.
    - A NaN or infinite loss is never remembered. It still enters the returned sum, because hiding
      it would also hide it from a gradient scaler or an anomaly check; it is counted in
      `nonfinite`, and `check_finite` raises an error naming the task.

    Args:
        tasks: The task names, each once.
        strict: Raise at once on a NaN or infinite loss. This waits for the device on every call.

    Attributes:
        tasks: The task names, in order.
        nonfinite: Number of NaN or infinite losses per task since the last `check_finite`, int64
            of shape (T,); not part of the state dict.
        synchronize: Whether processes that train together (torch.distributed is initialised)
            remember the mean of their losses, so that their weights are the same; True. Then all
            of them have to make each call.

    Example:
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
        # No buffer: DistributedDataParallel gives all processes those of the first.
        self.nonfinite = torch.zeros(len(self.tasks), dtype=torch.int64)
        self._latest: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.nonfinite = fn(self.nonfinite)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the buffers, of the weights and of the returned sum."""
        return self.nonfinite.device

    @abstractmethod
    def weights(self) -> Tensor:
        """Weight of each task: a new detached tensor of shape (T,), in the order of `tasks`."""

    def observe(self, losses: Tensor, accepted: Tensor) -> None:
        """Remembers the losses of one training step; the base class remembers nothing.

        Args:
            losses: Detached float32 losses of shape (T,); meaningless where not accepted.
            accepted: Bool of shape (T,): the task is present and its loss finite.
        """

    def forward(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Returns the weighted sum of the losses present.

        Args:
            losses: A 0-dim floating-point tensor for each task, or None for a missing one.

        Raises:
            TypeError: If `losses` is no mapping, or a loss no floating-point tensor.
            ValueError: If a task is unknown, a loss not a scalar, or no loss present.
            RuntimeError: If `strict` and a loss is NaN or infinite.
        """
        present = self.check_losses(losses)
        stacked = self._stack(present)
        values = stacked.detach()
        accepted = values.abs() < inf  # the finite ones; NaN is not below anything
        if self.strict:
            bad = (~accepted).long()
            if self.synchronize and self.training and torch.is_grad_enabled():
                sum_over_processes(bad)  # all of them raise, or none
            self._raise_nonfinite(bad.tolist())
        if self.training and torch.is_grad_enabled():
            self.nonfinite += ~accepted
            for index, task in enumerate(self.tasks):
                if task not in present:
                    accepted[index].fill_(False)  # a fill copies nothing from the host
            # float64 losses beyond float32's range are finite, and must stay so
            self._latest = (values.clamp(-_HUGE, _HUGE).float(), accepted)
            if self.synchronize:
                self._latest = mean_over_processes(*self._latest)
            self.observe(*self._latest)
        return (self._weights_for(present) * stacked).sum()

    def check_finite(self) -> None:
        """Raises if a loss was NaN or infinite since the last check, then starts counting anew.

        Reads the counts from the device, so it waits for it: call it rarely.

        Raises:
            RuntimeError: Naming the tasks and how often it happened.
        """
        found = self.nonfinite
        counts = (sum_over_processes(found.clone()) if self.synchronize else found).tolist()
        if any(counts):
            found.zero_()
        self._raise_nonfinite(counts)

    def forget(self) -> None:
        """Forget what no state holds: losses that were not finite, and the latest ones."""
        self.nonfinite.zero_()
        self._latest = None

    def unseen(self) -> dict[str, int]:
        """Tasks that have had no loss for longer than the weighting remembers: for how many steps.

        Reads the numbers from the device. The base class remembers nothing, and says nothing.
        """
        return {}

    @property
    def latest(self) -> tuple[Tensor, Tensor] | None:
        """The losses of the last training step, as `observe` took them, without waiting for them.

        Float32 losses (T,) and which of them count, bool (T,); None before the first step.
        """
        return self._latest

    def as_dict(self) -> dict[str, float]:
        """Returns the current weights by task as floats (this waits for the device).

        Example:
            >>> from torch_adapmtl.weighting import EqualWeighting
            >>> EqualWeighting(["seg", "depth"]).as_dict()
            {'seg': 1.0, 'depth': 1.0}
        """
        return dict(zip(self.tasks, self.weights().tolist(), strict=True))

    def extra_repr(self) -> str:
        """Shows the tasks in the module's repr."""
        return f"tasks={list(self.tasks)}"

    def _weights_for(self, present: dict[str, Tensor]) -> Tensor:
        return self.weights()

    def check_losses(self, losses: object) -> dict[str, Tensor]:
        """Returns the losses present by task, in the order of `tasks`, if they are as they should.

        Raises:
            TypeError: If `losses` is no mapping, or a loss no floating-point tensor.
            ValueError: If a task is unknown, a loss not a scalar, or no loss present.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"losses must be a mapping from task to loss, got a {type(losses).__name__}; name "
                f"each loss by its task, one of {list(self.tasks)}"
            )
        if unknown := [task for task in losses if task not in self.tasks]:
            raise ValueError(
                f"losses has unknown tasks {unknown}; the tasks are {list(self.tasks)}"
            )
        present = {}
        for task in self.tasks:
            loss = losses.get(task)
            if loss is None:
                continue
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"losses[{task!r}] must be a tensor that backward() can use, got "
                    f"{type(loss).__name__}; pass the loss itself, not loss.item()"
                )
            if loss.ndim:
                raise ValueError(
                    f"losses[{task!r}] must be a scalar, got shape {tuple(loss.shape)}; "
                    "reduce it first, for example with .mean()"
                )
            if not loss.is_floating_point():
                raise TypeError(
                    f"losses[{task!r}] must be floating point, got {loss.dtype}; cast it, for "
                    "example with .float()"
                )
            present[task] = loss
        if not present:
            raise ValueError(
                f"losses holds no loss, got {losses!r}; pass at least one of the tasks "
                f"{list(self.tasks)}"
            )
        return present

    def _stack(self, present: dict[str, Tensor]) -> Tensor:
        """All losses as one differentiable (T,) tensor, with 0 for the missing tasks."""
        dtype = torch.float32
        for loss in present.values():
            dtype = torch.promote_types(dtype, loss.dtype)
        rows = []
        for task in self.tasks:
            if task in present:
                rows.append(present[task].to(device=self.device, dtype=dtype))
            else:
                rows.append(torch.zeros((), dtype=dtype, device=self.device))
        return torch.stack(rows)

    def _raise_nonfinite(self, counts: list[int]) -> None:
        if any(counts):
            found = dict(zip(self.tasks, map(int, counts), strict=True))
            named = ", ".join(f"{task!r} ({n}x)" for task, n in found.items() if n)
            raise RuntimeError(
                f"NaN or infinite loss of the tasks {named}. It was kept out of the weighting, but "
                "its gradient may have reached the model: look at how this loss is computed, "
                "at the learning rate and at mixed precision, and resume from a checkpoint"
            )


def check_tasks(tasks: object) -> tuple[str, ...]:
    """Returns the task names if they are names, at least one, and each once."""
    names = tuple(tasks) if isinstance(tasks, Iterable) else (tasks,)
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in names):
        raise TypeError(f"tasks must be a sequence of task names (strings), got {tasks!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name at least one task and each once, got {list(names)}")
    return names


def check_names(name: str, weights: Mapping[str, object], tasks: tuple[str, ...]) -> None:
    """Raises unless `weights` maps exactly the `tasks`."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping from task to weight, got {weights!r}")
    if set(weights) != set(tasks):
        missing = [task for task in tasks if task not in weights]
        unknown = [task for task in weights if task not in tasks]
        raise ValueError(
            f"{name} must be for exactly the tasks {list(tasks)}: missing {missing}, "
            f"unknown {unknown}"
        )


def check_weight(name: str, weight: object) -> None:
    """Raises unless `weight` is a finite number and not negative."""
    check_numbers(**{name: weight})
    if not 0 <= cast(float, weight) < inf:
        raise ValueError(f"{name} must be finite and not negative, got {weight}")
