"""Warnings that a run goes wrong, each with a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.layers.sampling import take
from torch_adapmtl.run.report import Report
from torch_adapmtl.weighting._record import LossCourse, LossRecord

__all__ = ["Watch", "signs"]

# Share of the summed task weights above which a task dominates the training.
_DOMINANT = 0.8
# A loss that is this many times as large at the end as at its lowest may be a sign, and one that is
# this many times as large is one in any unit.
_MULTIPLE, _LARGE_MULTIPLE = 3.0, 50.0
# Number of steps after which a gradient scaler has found its scale, and a warm-up is above zero.
_PATIENCE = 50
# Number of weights of a layer that are compared to detect whether it is trained.
_COMPARED = 64
# Number of weights whose median is known well enough, and how many times as far as others pruned
# weights must move to be written from elsewhere. Gradients move them about as far, or not at all.
_KNOWN, _FAR = 20, 15.0


class _Idleness:
    """Detects that no optimiser trains the weights although steps are counted.

    A few values of each dense weight are compared.

    Args:
        layers: The layers, with dense weights, after the first step.
    """

    def __init__(self, layers: Layers) -> None:
        self._values = [_some(layer.weight) for layer in layers]

    def decided(self, step: int, layers: Layers) -> bool | str:
        """Return True if weights are trained, False if that is unknown, a text if not."""
        weights = [layer.weight for layer in layers]
        pairs = zip(map(_some, weights), self._values, strict=True)
        if not all(torch.equal(now, before.to(now.device)) for now, before in pairs):
            return True
        if step < _PATIENCE or not any(weight.requires_grad for weight in weights):
            return False
        return (
            f"step() was called {step} times, and no weight has changed since the first: call "
            f"backward() and the optimizer's step() before each step(), with an optimizer of this "
            f"model's parameters, as param_groups() gives them"
        )


@torch.no_grad()
def _some(weight: Tensor) -> Tensor:
    size = weight.numel()
    where = torch.arange(min(size, _COMPARED), device=weight.device)
    return take(weight, where * (size // max(len(where), 1)))


class _Rewriting:
    """Detects that a loop writes weights from a copy of its own, in which nothing is pruned.

    It moves weights that are not pruned by a step of the training, and pruned weights from zero to
    their values in the copy.

    Args:
        layers: Layers after a step, with sparse weights.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._values = {layer.name: _some(layer.weight) for layer in layers}

    def found(self, layers: Iterable[Layer]) -> bool:
        """Whether that has happened since, in these layers."""
        moved, zero = [], []
        for layer in layers:
            has_zeros = layer.threshold.known() or layer.mask is not None
            if has_zeros and layer.name in self._values:
                before = self._values[layer.name]
                moved.append((_some(layer.weight) - before).abs().cpu())
                zero.append((before == 0).cpu())
        if not moved:
            return False
        far, pruned = torch.cat(moved), torch.cat(zero)
        if min(int(pruned.sum()), int((~pruned).sum())) < _KNOWN:
            return False
        return bool(far[pruned].median() > _FAR * far[~pruned].median())


class Watch:
    """Warnings during a run; each is given once."""

    def __init__(self) -> None:
        self._begun: int | None = None
        self._rewriting: _Rewriting | None = None
        self._rewritten: bool | None = False  # None after the warning
        self._idleness: _Idleness | None = None
        self._unseen: set[str] = set()

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._begun is not None

    def begin(self, step: int, layers: Layers) -> None:
        """Store a few dense weights after the first step that this process takes."""
        self._begun, self._idleness = step, _Idleness(layers)

    def before(self, layers: Iterable[Layer]) -> None:
        """Store a few weights of sparse layers, for `after` in the next step."""
        if self._rewritten is not None:
            self._rewriting = _Rewriting(layers)

    def after(self, layers: Iterable[Layer]) -> None:
        """Look at layers that no optimiser has updated; this may wait for the device."""
        if self._rewriting is not None and self._rewriting.found(layers):
            self._rewritten = True
        self._rewriting = None

    def look(self, step: int, layers: Layers, unseen: Mapping[str, int]) -> list[str]:
        """Return the warnings after `step` steps; this may wait for the device.

        Args:
            step: How many steps have been taken.
            layers: The layers, with dense weights.
            unseen: The tasks without a loss for longer than their window, and for how many steps.
        """
        warnings = []
        taken = step - (self._begun or 0)
        if self._idleness is not None and (decided := self._idleness.decided(taken, layers)):
            self._idleness = None
            if isinstance(decided, str):
                warnings.append(decided)
        if self._rewritten:
            self._rewritten = None
            warnings.append(
                "the loop writes weights from a copy of its own (master weights, or the vector of "
                "another optimizer), in which nothing is pruned: pruned weights were back at their "
                "values there when step() was called. So the model computes with dense weights "
                "until the zeros are fixed, and wrong weights are pruned. Write the copy in the "
                "step() of a subclass of torch.optim.Optimizer, during which the parameters hold "
                "the dense weights; or write changes, as in parameter.add_(new - old)"
            )
        warnings += [
            f"task {task!r} has had no loss for {steps} steps (0 counts as none), longer than the "
            f"window that its weight is computed from: its weight does not change any more, and "
            f"its part of the model is still pruned. If this is not intended, check the names in "
            f"the losses and the data"
            for task, steps in unseen.items()
            if task not in self._unseen
        ]
        self._unseen |= unseen.keys()
        return warnings


def signs(
    report: Report,
    record: LossRecord,
    *,
    task_weights: Mapping[str, float],
) -> list[str]:
    """Return warnings of everything that went wrong in a run; an empty list if nothing did.

    Args:
        report: The report at the end of the run.
        record: The record of the losses.
        task_weights: The weights of the tasks; empty if the user chose them.
    """
    warnings = []
    emptied = [row.name for row in report.layers if row.weights == row.zeros > 0]
    if emptied:
        warnings.append(
            f"no weight is left in {len(emptied)} of {len(report.layers)} layers, such as "
            f"{emptied[0]!r}: their outputs are constant, and a task may be lost. Prune to a lower "
            f"sparsity, or by a method that keeps weights in every layer, as the default does"
        )
    total = sum(task_weights.values())
    for task, weight in task_weights.items():
        if len(task_weights) > 1 and weight > _DOMINANT * total:
            warnings.append(
                f"task {task!r} has taken {weight / total:.0%} of the task weights, so the others "
                f"hardly train: in the direction 'stable' a loss does that which does not "
                f"fluctuate, because it cannot be learned or is learned already, in the direction "
                f"'deviating' one that fluctuates much. Set narrower bounds in "
                f"StabilityWeighting, or weighting='equal'"
            )
    warnings += [
        f"the loss of task {task!r} ended at {course.last:.3g}, after {course.first:.3g} at the "
        f"beginning and {course.lowest:.3g} at best: it diverged, or the model lost what it knew. "
        f"Lower the learning rate, prune to less, or give the schedule more steps"
        for task, course in record.courses().items()
        if course.last > _limit(course, _guess(report, task))
    ]
    for task in record.absent():
        warnings.append(
            f"task {task!r} never had a loss, so nothing trained its part of the model, which is "
            f"pruned all the same: look at the names in the losses and at the data, or leave it "
            f"out (exclude=, task_outputs=)"
        )
    for task in record.unlabelled():
        warnings.append(
            f"all losses of task {task!r} were exactly 0, so nothing trained its part of the "
            f"model, which is pruned all the same: look for its labels in the data and for a "
            f"factor 0 in its loss, or leave it out (exclude=, task_outputs=)"
        )
    for task in record.untrained():
        warnings.append(
            f"no loss of task {task!r} ever required grad, so nothing trained that task: it was "
            f"detached (by detach(), item() or no_grad) or made anew by torch.tensor(). If that is "
            f"meant, leave the task out of the losses"
        )
    return warnings


def _limit(course: LossCourse, guess: float) -> float:
    """The loss at the end beyond which a task has lost most of what it knew, or has diverged.

    It is a multiple of the lowest value, and nearer to what a guess costs than to it: after
    pruning, many times a loss near zero can be as accurate, but not a loss near a guess. A loss
    that was far above a guess in between has a larger unit, or has exploded: then its highest value
    stands for the guess, unless it ends at a large multiple of its lowest.
    """
    guess = max(guess, course.first)
    limit = (course.lowest + guess) / 2
    if course.highest > 2 * guess:
        middle = (course.lowest + course.highest) / 2
        limit = max(limit, min(middle, _LARGE_MULTIPLE * course.lowest))
    return max(_MULTIPLE * course.lowest, limit)


def _guess(report: Report, task: str) -> float:
    """What a guess costs: the cross-entropy of as many classes as outputs; else 1."""
    rows = [row for row in report.layers if row.component == task]
    outputs = rows[-1].shape[0] if rows else 1
    return math.log(outputs) if outputs > 1 else 1.0
