"""The task losses of a run: checked, stacked, averaged over processes, and counted, once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl._distributed import mean_over_processes, sum_over_processes
from torch_adapmtl._precision import KeepsPrecision

__all__ = ["LossRecord"]

# Losses are clamped to this, so that the difference of two stays finite.
_HUGE = torch.finfo(torch.float32).max / 4
# Readings that make up the beginning of a run.
_FIRST = 5
# Share of the average kept from one reading to the next.
_DECAY = 0.8


class LossRecord(KeepsPrecision):
    """What is known of the losses of each task.

    Nothing here waits for the device but `raise_nonfinite` and `starts_and_ends`.

    Args:
        tasks: The task names, in order.

    Attributes:
        nonfinite: Number of NaN or infinite losses per task since the last `raise_nonfinite`, int64
            of shape (T,); not part of the state dict.
        latest: The losses of the last training step, float32 (T,), and which of them count, bool
            (T,); None before the first step.
        first: Sum of each task's first readings, and their number, float32 (2, T).
        recent: Exponential average of each task's readings, and their number, float32 (2, T).
        with_grad: The tasks that had a loss that requires grad.
        without_grad: The tasks that had one that does not.
    """

    first: Tensor
    recent: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        # Not a buffer: DistributedDataParallel would give all processes that of the first.
        self.nonfinite = torch.zeros(len(self.tasks), dtype=torch.int64)
        self.latest: tuple[Tensor, Tensor] | None = None
        self.register_buffer("first", torch.zeros(2, len(self.tasks)))
        self.register_buffer("recent", torch.zeros(2, len(self.tasks)))
        self.with_grad: set[str] = set()
        self.without_grad: set[str] = set()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.nonfinite = fn(self.nonfinite)
        return self

    def check(self, losses: object) -> dict[str, Tensor]:
        """Return the losses that are present, by task in the order of `tasks`.

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

    def stack(self, present: Mapping[str, Tensor]) -> Tensor:
        """All losses as one differentiable (T,) tensor, float32 or wider, 0 for missing tasks."""
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

    def count(
        self, present: Mapping[str, Tensor], stacked: Tensor, *, synchronize: bool
    ) -> tuple[Tensor, Tensor]:
        """Take in the losses of a training step; return `latest`."""
        values = stacked.detach()
        accepted = values.abs() < inf  # the finite ones; NaN is not below anything
        self.nonfinite += ~accepted
        for index, task in enumerate(self.tasks):
            if task not in present:
                accepted[index].fill_(False)  # a fill copies nothing from the host
        # float64 losses beyond float32's range are finite, and must stay so
        latest = values.clamp(-_HUGE, _HUGE).float(), accepted
        self.latest = mean_over_processes(*latest) if synchronize else latest
        return self.latest

    def note_gradients(self, present: Mapping[str, Tensor], training: bool) -> bool:
        """Note which losses require grad; return whether any does.

        One without beside others that have it may well be meant: a batch that has no labels for a
        task, or a task that is frozen. So it is an error only if backward() would do nothing.

        Raises:
            ValueError: If none does, in training.
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
        """Take the latest losses into the averages of the beginning and of now."""
        if self.latest is None:
            return
        losses, accepted = (tensor.to(self.first.device) for tensor in self.latest)
        early = accepted & (self.first[1] < _FIRST)
        self.first += torch.stack([losses.masked_fill(~early, 0.0), early.float()])
        average, count = self.recent
        moved = torch.where(count > 0, average.lerp(losses, 1 - _DECAY), losses)
        self.recent[0] = torch.where(accepted, moved, average)
        self.recent[1] += accepted

    def forget(self) -> None:
        """Forget what no state holds: losses that were not finite, and the latest ones."""
        self.nonfinite.zero_()
        self.latest = None

    # --- what it says -----------------------------------------------------------------------------

    def raise_nonfinite(self, counts: Tensor | None = None, *, synchronize: bool) -> None:
        """Raise a `RuntimeError` naming the tasks that had NaN or infinite losses, and how often.

        Args:
            counts: How many, int64 (T,); those since the last call if None, which starts anew then.
            synchronize: Whether to add up over processes, so that all of them raise, or none.
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

    def starts_and_ends(self) -> dict[str, tuple[float, float]]:
        """By task what the loss was at the beginning of the run, and what it is now."""
        total, count = self.first
        starts, ends = (total / count).tolist(), self.recent[0].tolist()
        return dict(zip(self.tasks, zip(starts, ends, strict=True), strict=True))

    def untrained(self) -> list[str]:
        """The tasks that had losses, but never one that requires grad."""
        return [task for task in self.tasks if task in self.without_grad - self.with_grad]

    def absent(self) -> list[str]:
        """The tasks that never had a loss, though others had."""
        had = self.with_grad | self.without_grad
        return [task for task in self.tasks if had and task not in had]

    def had_losses(self) -> list[int]:
        """Which tasks had losses with and without a gradient, in the bits of two numbers."""
        return [
            sum(1 << bit for bit, task in enumerate(self.tasks) if task in tasks)
            for tasks in (self.with_grad, self.without_grad)
        ]

    def set_had_losses(self, had: Sequence[int]) -> None:
        """Take over what `had_losses` returned."""
        for tasks, bits in zip((self.with_grad, self.without_grad), had, strict=False):
            tasks.clear()
            tasks.update(task for bit, task in enumerate(self.tasks) if bits >> bit & 1)
