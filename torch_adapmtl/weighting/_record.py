"""The record of the task losses of a run: checks, stacks, averages and counts them once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_adapmtl._checks import outputs_named_like
from torch_adapmtl._distributed import mean_over_processes, sum_over_processes
from torch_adapmtl._precision import KeepsPrecision

__all__ = ["LossCourse", "LossRecord"]

# Losses are clamped to this, so that the difference of two stays finite.
_HUGE = torch.finfo(torch.float32).max / 4
# Number of steps at the beginning of a run that are all read: a loss can diverge in the second.
_FIRST = 5
# Number of steps without a reading after which the record reads by itself: nobody else does when a
# model is trained on after its run.
_UNREAD = 20
# Share of the average that remains after each reading.
_DECAY = 0.8


class LossCourse(NamedTuple):
    """The course of a task's loss: the first one, and three values of its running average."""

    first: float
    lowest: float
    highest: float
    last: float


class LossRecord(KeepsPrecision):
    """The losses of each task: the latest ones, the course of their average, and counts.

    A loss of exactly 0 is no observation: it is what a masked mean, or a task of
    `torch_adapmtl.tasks`, returns for a batch without labels. Such a loss is treated as a missing
    one, but is still part of the sum, so that the graph reaches the task's parameters.

    Only `raise_nonfinite` and the methods under "results" that say so wait for the device.

    Args:
        tasks: The task names, in order.

    Attributes:
        nonfinite: Number of NaN or infinite losses per task since the last `raise_nonfinite`, int64
            of shape (T,); not part of the state dict.
        latest: The last observed loss of each task; whether it came after the last `read`, as 1 or
            0; and whether it came in the last `count`; float32 (3, T).
        course: Of each task, the first reading, the exponential average of the readings, its lowest
            and its highest value, and the number of readings; float32 (5, T).
        with_grad: The tasks that have had a loss that requires grad.
        without_grad: The tasks that have had a loss that does not require grad.
    """

    latest: Tensor
    course: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        # Not a buffer: DistributedDataParallel would copy it from the first process to all others.
        self.nonfinite = torch.zeros(len(self.tasks), dtype=torch.int64)
        self.register_buffer("latest", torch.zeros(3, len(self.tasks)))
        self.register_buffer("course", torch.zeros(5, len(self.tasks)))
        self._early = _FIRST  # number of steps from now on after which to read
        self._unread = 0  # number of steps since the last reading
        self.with_grad: set[str] = set()
        self.without_grad: set[str] = set()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.nonfinite = fn(self.nonfinite)
        return self

    def check(self, losses: object) -> dict[str, Tensor]:
        """Return the losses that are not None, by task in the order of `tasks`.

        Raises:
            TypeError: If `losses` is not a mapping, or a loss is not a floating-point tensor.
            ValueError: If a task is unknown, a loss is not a scalar, or there is no loss.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"losses must be a mapping from task to loss, got a {type(losses).__name__}; name "
                f"each loss by its task, one of {list(self.tasks)}"
            )
        if unknown := [task for task in losses if task not in self.tasks]:
            rename = outputs_named_like(unknown, self.tasks, rest=True)
            raise ValueError(
                f"losses has unknown tasks {unknown}; the tasks are {list(self.tasks)}"
                + (f"; to rename them, pass apply_adapmtl({rename})" if rename else "")
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

    def stack(self, present: Mapping[str, Tensor]) -> Tensor:
        """Stack the losses into a differentiable (T,) tensor, float32 or wider; 0 if missing."""
        device, dtype = self.nonfinite.device, torch.float32
        for loss in present.values():
            dtype = torch.promote_types(dtype, loss.dtype)
        rows = []
        for task in self.tasks:
            if task in present:
                rows.append(present[task].to(device=device, dtype=dtype))
            else:
                rows.append(torch.zeros((), dtype=dtype, device=device))
        return torch.stack(rows)

    def count(self, stacked: Tensor, *, synchronize: bool) -> tuple[Tensor, Tensor]:
        """Record the losses of a training step.

        Args:
            stacked: The result of `stack`.
            synchronize: Whether to average over the processes that have observed a task.

        Returns:
            The losses, float32 (T,), and whether each is an observation, bool (T,): present, finite
            and not 0.
        """
        values = stacked.detach()
        finite = values.abs() < inf  # NaN is not below anything
        self.nonfinite += ~finite
        # float64 losses beyond float32's range are finite and must stay finite
        losses = values.clamp(-_HUGE, _HUGE).float()
        accepted = finite & (losses != 0)  # a missing task is 0 too
        if synchronize:
            losses, accepted = mean_over_processes(losses, accepted)
        observed = torch.stack([losses, accepted.to(losses.dtype)])
        torch.where(accepted, observed, self.latest[:2], out=self.latest[:2])
        self.latest[2] = accepted
        self._unread += 1
        if self._early or self._unread > _UNREAD:
            self._early = max(self._early - 1, 0)
            self.read()
        return losses, accepted

    def note_gradients(self, present: Mapping[str, Tensor], training: bool) -> bool:
        """Note which losses require grad; return whether any does.

        Some losses without grad can be intended: the batch has no labels for a task, or the task is
        frozen. So it is an error only if no loss requires grad and backward() would do nothing.

        Raises:
            ValueError: If `training` is True and no loss requires grad.
        """
        learning = {task for task, loss in present.items() if loss.requires_grad}
        if training and not learning:
            raise ValueError(
                f"losses: none requires grad, of the tasks {list(present)}, so backward() could "
                f"train nothing: pass them as computed from the model's outputs, not detached or "
                f"made anew; to look at the weighted sum only, call under torch.no_grad() or after "
                f"model.eval()"
            )
        if training:
            self.with_grad |= learning
            self.without_grad |= present.keys() - learning
        return bool(learning)

    @torch.no_grad()
    def read(self) -> None:
        """Add the losses that were observed since the last reading to the course."""
        losses, fresh = self.latest[0], self.latest[1] > 0
        first, average, lowest, highest, count = self.course
        new = count == 0
        average = torch.where(new, losses, average.lerp(losses, 1 - _DECAY))
        moved = [
            torch.where(new, losses, first),
            average,
            torch.where(new, losses, torch.minimum(lowest, average)),
            torch.where(new, losses, torch.maximum(highest, average)),
            count + 1,
        ]
        torch.where(fresh, torch.stack(moved), self.course, out=self.course)
        self.latest[1].zero_()
        self._unread = 0

    def forget(self) -> None:
        """Reset what the state dict does not hold, after it was loaded; reads the counts."""
        self.nonfinite.zero_()
        self._early = max(_FIRST - int(self.course[4].max()), 0)

    # --- results ----------------------------------------------------------------------------------

    def raise_nonfinite(self, counts: Tensor | None = None, *, synchronize: bool) -> None:
        """Raise a `RuntimeError` if there were NaN or infinite losses; it names the tasks.

        Args:
            counts: The number for each task, int64 (T,). If None, `nonfinite` is used and reset.
            synchronize: Whether to sum over processes, so that either all of them raise or none.
        """
        counted = self.nonfinite.clone() if counts is None else counts
        numbers = (sum_over_processes(counted) if synchronize else counted).tolist()
        if not any(numbers):
            return
        if counts is None:
            self.nonfinite.zero_()
        by_task = zip(self.tasks, map(int, numbers), strict=True)
        named = ", ".join(f"{task!r} ({n}x)" for task, n in by_task if n)
        raise RuntimeError(
            f"NaN or infinite loss of the tasks {named}. It was kept out of the weighting, but "
            "its gradient may have reached the model: look at how this loss is computed, "
            "at the learning rate and at mixed precision, and resume from a checkpoint"
        )

    def last(self) -> dict[str, float]:
        """Return the last observed loss of each task that has had one; reads it from the device."""
        losses = zip(self.tasks, self.latest[0].tolist(), strict=True)
        return {task: loss for task, loss in losses if loss}  # 0 is never observed

    def courses(self) -> dict[str, LossCourse]:
        """Return the course of the loss of each task that has had one; reads it from the device."""
        self.read()
        columns = self.course.T.tolist()
        return {
            task: LossCourse(first, lowest, highest, last)
            for task, (first, last, lowest, highest, count) in zip(self.tasks, columns, strict=True)
            if count
        }

    def untrained(self) -> list[str]:
        """The tasks that have had losses, but never a loss that requires grad."""
        return [task for task in self.tasks if task in self.without_grad - self.with_grad]

    def absent(self) -> list[str]:
        """The tasks that have never had a loss, if other tasks have."""
        present = self.with_grad | self.without_grad
        return [task for task in self.tasks if present and task not in present]

    def unlabelled(self) -> list[str]:
        """The tasks whose losses were all exactly 0; reads the counts from the device."""
        seen = self.courses()
        return [task for task in self.tasks if task in self.with_grad and task not in seen]

    def had_losses(self) -> list[int]:
        """Return `with_grad` and `without_grad` as two numbers, one bit for each task."""
        return [
            sum(1 << bit for bit, task in enumerate(self.tasks) if task in tasks)
            for tasks in (self.with_grad, self.without_grad)
        ]

    def set_had_losses(self, had: Sequence[int]) -> None:
        """Set `with_grad` and `without_grad` from the result of `had_losses`."""
        for tasks, bits in zip((self.with_grad, self.without_grad), had, strict=False):
            tasks.clear()
            tasks.update(task for bit, task in enumerate(self.tasks) if bits >> bit & 1)
