"""Signs that a run went wrong, in words that say what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from .report import Report

__all__ = ["Losses", "signs"]

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


@dataclass
class Losses:
    """What the task losses were at the start of a run, and what they are now.

    Attributes:
        first: For each task the sum of its first readings and their number.
        recent: For each task an exponential average of its readings.
    """

    first: dict[str, tuple[float, int]] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)

    def read(self, losses: Mapping[str, float]) -> None:
        """Take in the losses of one step; those that are not finite say nothing."""
        for task, loss in losses.items():
            if not isfinite(loss):
                continue
            total, count = self.first.get(task, (0.0, 0))
            if count < _FIRST:
                self.first[task] = (total + loss, count + 1)
            before = self.recent.get(task, loss)
            self.recent[task] = _DECAY * before + (1 - _DECAY) * loss

    def diverged(self) -> dict[str, tuple[float, float]]:
        """The tasks whose loss is far above where it began: from what to what."""
        starts = {task: total / count for task, (total, count) in self.first.items()}
        return {
            task: (starts[task], recent)
            for task, recent in self.recent.items()
            if starts[task] > 0 and recent > _DIVERGED * starts[task]
        }


def signs(
    report: Report,
    losses: Losses,
    *,
    allocated: bool,
    task_weights: Mapping[str, float],
) -> list[str]:
    """Say what went wrong in a run, a sentence or two each; nothing if nothing did.

    Args:
        report: The report at its end.
        losses: The losses on the way.
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
    for task, (before, after) in losses.diverged().items():
        found.append(
            f"the loss of task {task!r} ended {after / before:.1f} times as large as it began "
            f"({before:.3g}, then {after:.3g}): it diverged, or the model lost what it knew. Lower "
            f"the learning rate, prune to less, or give the schedule more steps"
        )
    return found
