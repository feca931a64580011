"""Signs that a run went wrong, in words that say what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer
from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.layers.sampling import take
from torch_adapmtl.run.report import Report

__all__ = ["Idleness", "LossTrace", "Watch", "signs"]

# Share of the summed task weights above which one task has taken the training over.
_DOMINANT = 0.8
# Sparsities that differ less than this, relative to the smaller of density and sparsity, are equal.
_EQUAL = 1e-3
# A loss that ends this many times as large as it began has diverged.
_DIVERGED = 3.0
# Readings that make up the beginning.
_FIRST = 5
# Steps in which a gradient scaler has found its scale and a warm-up has left zero.
_PATIENCE = 50
# Weights looked at in a layer to see whether it is trained.
_LOOKED_AT = 64
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
        self._with_grad: set[str] = set()
        self._without: set[str] = set()

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

    def watch(self, losses: Mapping[str, Tensor], training: bool) -> bool:
        """Note which losses require grad; tell whether any does.

        One without beside others that have it may well be meant: a batch that has no labels for a
        task, or a task that is frozen. Hence an error only if backward() would do nothing at all.

        Raises:
            ValueError: If none does, in training.
        """
        learning = {task for task, loss in losses.items() if loss.requires_grad}
        if training and not learning:
            raise ValueError(
                f"losses: none requires grad, of the tasks {list(losses)}, so backward() could "
                f"train nothing: pass them as computed from the model's outputs, not detached or "
                f"made anew; to look at the weighted sum only, call under torch.no_grad() or after "
                f"model.eval()"
            )
        if training:
            self._with_grad |= learning
            self._without |= losses.keys() - learning
        return bool(learning)

    def untrained(self) -> list[str]:
        """The tasks that had losses, but never one that requires grad."""
        return [task for task in self.tasks if task in self._without - self._with_grad]

    def absent(self) -> list[str]:
        """The tasks that never had a loss, though others had."""
        had = self._with_grad | self._without
        return [task for task in self.tasks if had and task not in had]

    def had(self) -> list[int]:
        """Which tasks had losses with and without a gradient, in the bits of two numbers."""
        return [
            sum(1 << bit for bit, task in enumerate(self.tasks) if task in seen)
            for seen in (self._with_grad, self._without)
        ]

    def note(self, had: Sequence[int]) -> None:
        """Take over what `had` returned."""
        for seen, bits in zip((self._with_grad, self._without), had, strict=False):
            seen.clear()
            seen.update(task for bit, task in enumerate(self.tasks) if bits >> bit & 1)

    def diverged(self) -> dict[str, tuple[float, float]]:
        """The tasks whose loss is far above where it began: from what to what."""
        total, count = self.first
        starts, ends = (total / count).tolist(), self.recent[0].tolist()
        return {
            task: (start, end)
            for task, start, end in zip(self.tasks, starts, ends, strict=True)
            if start > 0 and end > _DIVERGED * start
        }


class Idleness:
    """Notices that nobody trains the weights, though the steps are counted.

    That a parameter was written to shows in its version, without waiting for the device. Some
    optimisers write past it; a few values tell then.

    Args:
        layers: The layers, as they are at the first step.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._versions = [layer.weight._version for layer in layers]
        self._values = [_some(layer.weight) for layer in layers]

    def over(self, step: int, layers: Sequence[Layer]) -> bool | str:
        """Whether it is clear after `step` steps that weights are trained; a warning if not."""
        weights = [layer.weight for layer in layers]
        if [weight._version for weight in weights] != self._versions:
            return True
        if step < _PATIENCE or not any(weight.requires_grad for weight in weights):
            return False
        pairs = zip(map(_some, weights), self._values, strict=True)
        if not all(torch.equal(now, before.to(now.device)) for now, before in pairs):
            return True
        return (
            f"step() was called {step} times, and no weight has changed since the first: call "
            f"backward() and the optimizer's step() before each step(), with an optimizer of this "
            f"model's parameters, as param_groups() gives them"
        )


@torch.no_grad()
def _some(weight: Tensor) -> Tensor:
    size = weight.numel()
    where = torch.arange(min(size, _LOOKED_AT), device=weight.device)
    return take(weight, where * (size // max(len(where), 1)))


class Watch:
    """What there is to say while a run goes on, each once."""

    def __init__(self) -> None:
        self._begun: int | None = None
        self._idleness: Idleness | None = None
        self._unseen: set[str] = set()

    def begin(self, step: int, layers: Sequence[Layer]) -> None:
        """Note how the weights are before the first step that this process takes."""
        if self._begun is None:
            self._begun, self._idleness = step, Idleness(layers)

    def look(self, step: int, layers: Sequence[Layer], unseen: Mapping[str, int]) -> list[str]:
        """Warnings after `step` steps, for which the device is waited for now and then.

        Args:
            step: How many steps have been taken.
            layers: The layers.
            unseen: The tasks that have had no loss for longer than their window: for how long.
        """
        found = []
        taken = step - (self._begun or 0)
        if self._idleness is not None and (said := self._idleness.over(taken, layers)):
            self._idleness = None
            if isinstance(said, str):
                found.append(said)
        found += [
            f"task {task!r} has had no loss for {steps} steps, longer than the window that its "
            f"weight is taken from: its weight is that of before, and its part of the model is "
            f"pruned all the same. If this is not meant, look at the names in the losses and at "
            f"the data"
            for task, steps in unseen.items()
            if task not in self._unseen
        ]
        self._unseen |= unseen.keys()
        return found


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
    emptied = [row.name for row in report.layers if row.weights == row.zeros > 0]
    if emptied:
        found.append(
            f"no weight is left in {len(emptied)} of {len(report.layers)} layers, such as "
            f"{emptied[0]!r}: what they give is constant, and a task may be lost for it. Prune to "
            f"less, or by a method that leaves every layer some weights, as AdapMTL's default does"
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
    for task in trace.absent():
        found.append(
            f"task {task!r} never had a loss, so nothing trained its part of the model, which is "
            f"pruned all the same: look at the names in the losses and at the data, or leave it "
            f"out (exclude=, task_outputs=)"
        )
    for task in trace.untrained():
        found.append(
            f"no loss of task {task!r} ever required grad, so nothing trained that task: it was "
            f"detached (by detach(), item() or no_grad) or made anew by torch.tensor(). If that is "
            f"meant, leave the task out of the losses"
        )
    return found
