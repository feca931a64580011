"""Signs that a run went wrong, in words that say what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._precision import KeepsPrecision
from .report import Report

__all__ = ["LossTrace", "signs"]

# Share of the summed task weights above which one task has taken the training over.
_DOMINANT = 0.8
# Sparsities that differ less than this, relative to the smaller of density and sparsity, are equal.
_EQUAL = 1e-3
# A loss that ends this many times as large as it began has diverged.
_DIVERGED = 3.0
# Readings that make up the beginning.
_FIRST = 5
# Share of the average kept from one reading to the next.
_DECAY = 0.8


class LossTrace(KeepsPrecision):
    """What the task losses were at the start of a run, and what they are now.

    Readings are taken on the device; only `diverged` waits for it.

    Args:
        tasks: The task names, in order.

    Attributes:
        first: Sum of each task's first readings, and their number, float32 (2, T).
        recent: Exponential average of each task's readings, and their number, float32 (2, T).
    """

    first: Tensor
    recent: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.register_buffer("first", torch.zeros(2, len(self.tasks)))
        self.register_buffer("recent", torch.zeros(2, len(self.tasks)))

    @torch.no_grad()
    def read(self, losses: Tensor, accepted: Tensor) -> None:
        """Take in the losses of one step, (T,), those that are accepted, bool (T,)."""
        losses, accepted = losses.to(self.first.device), accepted.to(self.first.device)
        early = accepted & (self.first[1] < _FIRST)
        self.first += torch.stack([losses.masked_fill(~early, 0.0), early.float()])
        average, count = self.recent
        moved = torch.where(count > 0, average.lerp(losses, 1 - _DECAY), losses)
        self.recent[0] = torch.where(accepted, moved, average)
        self.recent[1] += accepted

    def diverged(self) -> dict[str, tuple[float, float]]:
        """The tasks whose loss is far above where it began: from what to what."""
        total, count = self.first
        starts, ends = (total / count).tolist(), self.recent[0].tolist()
        return {
            task: (start, end)
            for task, start, end in zip(self.tasks, starts, ends, strict=True)
            if start > 0 and end > _DIVERGED * start
        }


def signs(
    report: Report,
    trace: LossTrace,
    *,
    allocated: bool,
    task_weights: Mapping[str, float],
) -> list[str]:
    """Say what went wrong in a run, a sentence or two each; nothing if nothing did.

    Args:
        report: The report at its end.
        trace: The losses on the way.
        allocated: Whether the components were free to differ in their sparsity, and meant to.
        task_weights: The weights of the tasks, if nobody chose them.
    """
    found = []
    sparsities = [row.sparsity for row in report.components]
    room = min(report.sparsity, 1 - report.sparsity)
    alike = len(sparsities) > 1 and max(sparsities) - min(sparsities) <= _EQUAL * room
    if allocated and alike and room > 0:
        found.append(
            f"all components are equally sparse ({report.sparsity:.2%}): nothing told them apart. "
            f"Their weights may not have been trained (look at their gradients), or the run was "
            f"too short; if they really are alike, this is as it should be"
        )
    total = sum(task_weights.values())
    for task, weight in task_weights.items():
        if len(task_weights) > 1 and weight > _DOMINANT * total:
            found.append(
                f"task {task!r} has taken {weight / total:.0%} of the task weights, so the others "
                f"hardly train: a loss that does not fluctuate, because it cannot be learned or "
                f"is learned already, does that. Set narrower bounds in StabilityWeighting, or "
                f"weighting='equal'"
            )
    for task, (before, after) in trace.diverged().items():
        found.append(
            f"the loss of task {task!r} ended {after / before:.1f} times as large as it began "
            f"({before:.3g}, then {after:.3g}): it diverged, or the model lost what it knew. Lower "
            f"the learning rate, prune to less, or give the schedule more steps"
        )
    return found
