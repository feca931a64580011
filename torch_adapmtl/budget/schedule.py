"""The schedule of the overall sparsity: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch_adapmtl._checks import check_choice, check_numbers

__all__ = ["SparsitySchedule", "check_schedule"]

# Default of `fix_at`, unless the schedule ends later.
_FIX_AT = 0.9
# Default of `end`: this much, less the slope times the part of the target that is beyond `_FROM`.
_END, _FROM, _SLOPE = 0.5, 0.95, 5.0


@dataclass(frozen=True)
class SparsitySchedule:
    """How the overall sparsity changes from `initial` to the target during training.

    Let p be the progress from `start` to `end`, between 0 and 1. The sparsity is
    `target + (initial - target) * f(p)`, where `f(p)` is `(1 - p)**3` for the cubic shape (Zhu and
    Gupta, arXiv 1710.01878), `1 - p` for the linear one and `(1 + cos(pi * p)) / 2` for the cosine
    one. Before `start` the sparsity is `initial`. From `end` on, and at the last step in any case,
    it is the target.

    Until `fix_at`, weights can become zero and nonzero again. From then on masks fix exactly as
    many zeros as the target asks for, and the other weights train without a threshold. Between
    `regrow_until` and `fix_at`, pruned weights receive no gradient. If they did, the set of pruned
    weights would keep changing, which is noise in a network with few remaining weights.

    Args:
        start: When the sparsity begins to rise, as a fraction of `total_steps`.
        end: When it reaches the target, as a fraction of `total_steps`. If None, it is 0.5, and
            0.05 less for each percent of the target above 95 %: 0.35 at 98 %. The fewer weights
            remain, the longer they are trained.
        initial: Sparsity before `start`, as a fraction of the prunable weights. A model that is
            already sparser starts from its present sparsity.
        shape: `"cubic"`, `"linear"` or `"cosine"`.
        fix_at: When the zeros are fixed, as a fraction of `total_steps`;
            `0 <= start <= end <= fix_at <= 1`. If None, it is `max(end, 0.9)`. Only
            [`Adaptive`][torch_adapmtl.Adaptive] uses this argument and the next.
        regrow_until: Until when pruned weights receive gradients and can become nonzero again, as a
            fraction of `total_steps` between `end` and `fix_at`. If None, it is half way between
            them. With `gradient="mask"` it has no effect.

    If `end` is None, `start`, `fix_at` and `regrow_until` must be valid with an end of 0.5, and a
    `regrow_until` of None stays None: it depends on the target, too.

    Raises:
        ValueError: If a fraction is outside its range, or the shape is unknown.
        TypeError: If a fraction is not a number.

    Example:
        >>> from torch_adapmtl import SparsitySchedule
        >>> schedule = SparsitySchedule(start=0.0, end=0.5)
        >>> [
        ...     round(schedule(step, 100, target_sparsity=0.8), 3)
        ...     for step in (0, 25, 50, 100)
        ... ]
        [0.0, 0.7, 0.8, 0.8]
        >>> schedule.regrow_until, schedule.fix_at
        (0.7, 0.9)
        >>> [round(SparsitySchedule().end_at(target), 2) for target in (0.9, 0.98)]
        [0.5, 0.35]
    """

    start: float = 0.0
    end: float | None = None
    initial: float = 0.0
    shape: Literal["cubic", "linear", "cosine"] = "cubic"
    fix_at: float | None = None
    regrow_until: float | None = None

    def __post_init__(self) -> None:
        # All numbers become floats, so that schedules with the same effect are equal.
        for name in ("start", "end", "initial", "fix_at", "regrow_until"):
            value = getattr(self, name)
            if value is not None or name in ("start", "initial"):
                check_numbers("schedule: ", **{name: value})
                object.__setattr__(self, name, float(value))
        end = _END if self.end is None else self.end
        if not 0.0 <= self.start <= end <= 1.0:
            raise ValueError(
                f"schedule: start and end must satisfy 0 <= start <= end <= 1, as fractions of "
                f"total_steps; got start={self.start}, end={end}"
            )
        fix_at = max(end, _FIX_AT) if self.fix_at is None else self.fix_at
        if not end <= fix_at <= 1.0:
            raise ValueError(
                f"schedule: fix_at must lie between end={end} and 1, as a fraction of "
                f"total_steps; got {fix_at}"
            )
        half = (end + fix_at) / 2
        regrow_until = half if self.regrow_until is None else self.regrow_until
        if not end <= regrow_until <= fix_at:
            raise ValueError(
                f"schedule: regrow_until must lie between end={end} and fix_at={fix_at}, as "
                f"a fraction of total_steps; got {regrow_until}"
            )
        if not 0.0 <= self.initial < 1.0:
            raise ValueError(f"schedule: initial must lie in [0, 1), got {self.initial}")
        check_choice("schedule: shape", self.shape, ("cubic", "linear", "cosine"))
        object.__setattr__(self, "fix_at", fix_at)
        if self.end is not None:
            object.__setattr__(self, "regrow_until", regrow_until)

    def end_at(self, target_sparsity: float) -> float:
        """Return when the sparsity reaches the target, as a fraction of `total_steps`.

        Args:
            target_sparsity: The sparsity at the end, as a fraction.
        """
        if self.end is not None:
            return self.end
        beyond = max(0.0, target_sparsity - _FROM)
        return max(self.start, _END - _SLOPE * beyond)

    def fix_step(self, total_steps: int) -> int:
        """Return the step at which the zeros are fixed."""
        assert self.fix_at is not None
        return max(1, math.ceil(self.fix_at * total_steps))

    def regrows(self, step: int, total_steps: int, target_sparsity: float) -> bool:
        """Whether pruned weights receive gradients in the step after `step` steps."""
        assert self.fix_at is not None
        until = self.regrow_until
        if until is None:
            until = (self.end_at(target_sparsity) + self.fix_at) / 2
        return step < until * total_steps

    def __call__(
        self, step: int, total_steps: int, target_sparsity: float, initial: float | None = None
    ) -> float:
        """Return the overall sparsity, a fraction, due after `step` of `total_steps` steps.

        Args:
            step: Number of steps taken.
            total_steps: Number of steps of the run.
            target_sparsity: The sparsity at the end, as a fraction.
            initial: The sparsity before `start`, instead of the attribute `initial`. If it is above
                the target, the sparsity falls.
        """
        target = target_sparsity
        initial = min(self.initial, target) if initial is None else initial
        start, end = self.start * total_steps, self.end_at(target) * total_steps
        if step >= end or step >= total_steps:
            return target
        if step <= start:
            return initial
        remaining = 1.0 - (step - start) / (end - start)
        if self.shape == "cosine":
            remaining = (1.0 - math.cos(math.pi * remaining)) / 2.0
        elif self.shape == "cubic":
            remaining = remaining**3
        return target + (initial - target) * remaining


def check_schedule(schedule: object) -> None:
    """Raise a `TypeError` unless `schedule` is a `SparsitySchedule`."""
    if not isinstance(schedule, SparsitySchedule):
        raise TypeError(
            f"schedule must be a SparsitySchedule, such as SparsitySchedule(shape='linear'), got "
            f"{schedule!r}"
        )
