"""The sparsity budget: how many weights are zero at each step, and which threshold makes it so.

A weight's *score* is `|w| / exp(offset)` with the learned offset of its layer; one level for the
whole model decides: scores up to the level are pruned. The solver finds the level that meets the
budget. It works on integers, because the bits of non-negative float32 numbers are ordered as the
numbers are: bisection over them is exact and ends after 31 halvings, without a host round trip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_adapmtl._checks import check_numbers

__all__ = [
    "Bounds",
    "Scores",
    "SparsitySchedule",
    "bisect",
    "from_bits",
    "pruned",
    "select",
    "solve",
    "to_bits",
]

# When the choice of zeros becomes final, as a fraction of the run, unless the user says otherwise.
_SETTLED = 0.9
# Bits are those of a float32, plus one: 0 is a weight that is gone in any case (its score is
# negative), the last stands for the largest finite number and for all that is not finite.
_MAX_BITS = 0x7F7FFFFF + 1


@dataclass(frozen=True)
class SparsitySchedule:
    """How the overall sparsity goes from `initial` to the target in the course of training.

    With p the share of the way from `start` to `end`, the sparsity is
    `target + (initial - target) * (1 - p)**3` for the cubic shape (Zhu and Gupta, arXiv
    1710.01878), the same with exponent 1 for the linear one and `(1 + cos(pi p)) / 2` in place of
    the power for the cosine one. Before `start` it is `initial`, from `end` on it is the target,
    and at the last step it is the target in any case.

    Which weights are zero may change until `settled`; from then on they are held by masks, exactly
    as many as asked for, and the others train on without a threshold. Before that, from
    `regrow_until` on, pruned weights learn no more: those that go on learning while they count as
    zero keep changing places with others, and in a net with few weights left that is noise.

    Args:
        start: When the sparsity begins to rise, as a fraction of `total_steps`.
        end: When it reaches the target, as a fraction of `total_steps`.
        settled: When the choice of zeros becomes final, as a fraction of `total_steps`;
            `0 <= start <= end <= settled <= 1`, or `max(end, 0.9)` if None. Baselines, whose
            pruned weights stay pruned, do without it, and without the next.
        regrow_until: Until when pruned weights learn on, and may return, as a fraction of
            `total_steps` between `end` and `settled`, or half way between them if None. With
            `gradient="mask"` they never do.
        initial: Sparsity before `start`, as a fraction of the prunable weights; a model that is
            sparser already starts from there.
        shape: `"cubic"`, `"linear"` or `"cosine"`.

    Raises:
        ValueError: If a fraction is outside its range, or the shape is unknown.
        TypeError: If a fraction is no number.

    Example:
        >>> from torch_adapmtl import SparsitySchedule
        >>> schedule = SparsitySchedule(start=0.0, end=0.5)
        >>> [round(schedule(step, 100, target=0.8), 3) for step in (0, 25, 50, 100)]
        [0.0, 0.7, 0.8, 0.8]
        >>> schedule.regrow_until, schedule.settled
        (0.7, 0.9)
    """

    start: float = 0.05
    end: float = 0.5
    initial: float = 0.0
    shape: Literal["cubic", "linear", "cosine"] = "cubic"
    settled: float | None = None
    regrow_until: float | None = None

    def __post_init__(self) -> None:
        check_numbers("schedule: ", start=self.start, end=self.end, initial=self.initial)
        for name in ("settled", "regrow_until"):
            value = getattr(self, name)
            if value is not None:
                check_numbers("schedule: ", **{name: value})
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"schedule: start and end must satisfy 0 <= start <= end <= 1, as fractions of "
                f"total_steps; got start={self.start}, end={self.end}"
            )
        settled = max(self.end, _SETTLED) if self.settled is None else self.settled
        if not self.end <= settled <= 1.0:
            raise ValueError(
                f"schedule: settled must lie between end={self.end} and 1, as a fraction of "
                f"total_steps; got {settled}"
            )
        half = (self.end + settled) / 2
        regrow_until = half if self.regrow_until is None else self.regrow_until
        if not self.end <= regrow_until <= settled:
            raise ValueError(
                f"schedule: regrow_until must lie between end={self.end} and settled={settled}, as "
                f"a fraction of total_steps; got {regrow_until}"
            )
        if not 0.0 <= self.initial < 1.0:
            raise ValueError(f"schedule: initial must lie in [0, 1), got {self.initial}")
        if self.shape not in ("cubic", "linear", "cosine"):
            raise ValueError(
                f"schedule: shape must be 'cubic', 'linear' or 'cosine', got {self.shape!r}"
            )
        # As numbers, all floats, so that records of equal schedules say the same.
        numbers = {"start": self.start, "end": self.end, "initial": self.initial}
        for name, value in {**numbers, "settled": settled, "regrow_until": regrow_until}.items():
            object.__setattr__(self, name, float(value))

    def last_update(self, total_steps: int) -> int:
        """The step at which the choice of zeros becomes final."""
        assert self.settled is not None
        return max(1, math.ceil(self.settled * total_steps))

    def regrows(self, step: int, total_steps: int) -> bool:
        """Whether pruned weights still learn in the step after `step` steps."""
        assert self.regrow_until is not None
        return step < self.regrow_until * total_steps

    def __call__(
        self, step: int, total_steps: int, target: float, initial: float | None = None
    ) -> float:
        """Return the overall sparsity, a fraction, due after `step` of `total_steps` steps.

        Args:
            step: How many steps have been taken.
            total_steps: How many there are.
            target: The sparsity at the end.
            initial: The sparsity before `start`, in place of the schedule's own; the schedule
                falls if it is above the target.
        """
        initial = min(self.initial, target) if initial is None else initial
        start, end = self.start * total_steps, self.end * total_steps
        if step >= end or step >= total_steps:
            return target
        if step <= start:
            return initial
        rest = 1.0 - (step - start) / (end - start)
        if self.shape == "cosine":
            rest = (1.0 - math.cos(math.pi * rest)) / 2.0
        elif self.shape == "cubic":
            rest = rest**3
        return target + (initial - target) * rest


@dataclass(frozen=True)
class Bounds:
    """How many zeros each layer and each component may and must have; counts in float64.

    Attributes:
        component: For each layer the index of its component, shape (L,).
        layer_max: Most zeros a layer may have, shape (L,).
        min_zeros: Fewest zeros a component must have, shape (C,).
        max_zeros: Most zeros a component may have, shape (C,).
    """

    component: Tensor
    layer_max: Tensor
    min_zeros: Tensor
    max_zeros: Tensor

    def total(self, counts: Tensor) -> Tensor:
        """Sum `counts` (L,), each held to its layer's bound, by component (C,)."""
        capped = torch.minimum(counts, self.layer_max)
        zeros = torch.zeros_like(self.min_zeros)
        return zeros.index_add_(0, self.component, capped)

    def clamp(self, zeros: Tensor) -> Tensor:
        """Hold the components' numbers of zeros (C,) within their bounds."""
        return zeros.clamp(self.min_zeros, self.max_zeros)


class Scores:
    """The scores of all layers, or of a sample of them, ready for counting.

    Args:
        scores: The scores of all layers one after the other, flat, float32; negative for weights
            that are gone in any case.
        lengths: How many of them belong to each layer.
        sizes: How many weights each layer has.
        below: For each layer how many of its weights are known to score below all those given,
            (L,); the given ones are then all that matter, not a sample.
    """

    def __init__(
        self,
        scores: Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int],
        below: Tensor | None = None,
    ) -> None:
        device = scores.device
        length = torch.tensor(lengths, device=device)
        self.base = torch.arange(len(lengths), device=device) << 32
        # Layer in the high word, score in the low one: one sort orders every layer's scores.
        layer = torch.repeat_interleave(self.base, length, output_size=len(scores))
        self.keys = (layer | to_bits(scores)).sort().values
        self.starts = length.cumsum(0) - length
        self.below = torch.zeros_like(length) if below is None else below
        self.scale = torch.ones_like(length, dtype=torch.float64)
        if below is None:
            self.scale = torch.tensor(sizes, device=device) / length.double()

    def count(self, level: Tensor) -> Tensor:
        """How many weights of each layer have scores up to `level` (bits, (L,) or 0-d): (L,)."""
        keys = self.base + level.clamp(min=0)
        found = torch.searchsorted(self.keys, keys, right=True) - self.starts
        found = torch.where(level < 0, 0, found + self.below)
        return found * self.scale

    def window(self, level: Tensor) -> tuple[list[int], list[int]]:
        """For each layer a range of levels that the exact one lies in, if this is a fair sample."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.keys)])])
        length = ends - self.starts
        rank = torch.searchsorted(self.keys, self.base + level.clamp(min=0)) - self.starts
        margin = (6.0 * length.double().sqrt() + 16.0).long()  # twelve standard deviations
        low, high = rank - margin, rank + margin
        last = len(self.keys) - 1
        bits = self.keys & 0xFFFFFFFF
        lowest = torch.where(low <= 0, -1, bits[(self.starts + low).clamp(0, last)])
        highest = torch.where(high >= length, _MAX_BITS, bits[(self.starts + high).clamp(0, last)])
        return lowest.tolist(), highest.tolist()


def bisect(count: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """The smallest level in bits whose count reaches `wanted`; -1 prunes nothing."""
    low = torch.full_like(wanted, -2, dtype=torch.long)
    high = torch.full_like(wanted, _MAX_BITS, dtype=torch.long)
    for _ in range(32):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        enough = count(middle) >= wanted
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high.clamp(min=-1)


def _common(scores: Scores, bounds: Bounds, zeros: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """The level (0-d) at which the bounded components hold `zeros`; how to count them at a level.

    The second takes a level for the model (0-d) or one for each component (C,), and gives counts
    (C,) that the layers' bounds hold already and the components' do not yet.
    """
    member = bounds.component

    def at(level: Tensor) -> Tensor:
        spread = level[member] if level.ndim else level.expand(len(member))
        return bounds.total(scores.count(spread))

    return bisect(lambda lv: bounds.clamp(at(lv)).sum(), zeros), at


def solve(scores: Scores, bounds: Bounds, zeros: Tensor) -> Tensor:
    """Find the level of each layer, in bits, at which the model has `zeros` zero weights.

    All layers share one level, except those that a bound holds back (the layer's own bound, or its
    component's). Where scores tie, or the scores are a sample, the count is met as nearly as a
    level can; `select` meets it exactly. Nothing here waits for the device.

    Args:
        scores: The scores to count.
        bounds: Bounds in numbers of zeros.
        zeros: The budget, a 0-d float64 tensor.

    Returns:
        The levels, int64 of shape (L,); `from_bits` turns them into thresholds on the scores.
    """
    common, at = _common(scores, bounds, zeros)
    free = at(common)
    due = bounds.clamp(free)
    level = torch.where(free != due, bisect(at, due), common)[bounds.component]
    cap = bisect(scores.count, bounds.layer_max)
    # A tie that would carry a layer past its bound is not pruned at all.
    cap = torch.where(scores.count(cap) > bounds.layer_max, cap - 1, cap)
    return torch.minimum(level, cap)


def select(scores: Scores, bounds: Bounds, zeros: int) -> tuple[list[int], list[int]]:
    """Say exactly which weights are pruned: per layer a level in bits and a number of zeros.

    A layer with level b and number k loses all its weights with scores below b and, of those that
    tie at b, the first ones in storage order until k are gone. Between components and between
    layers, ties go to the first. The numbers sum to `zeros`.

    Args:
        scores: The scores of all weights, or of all those near the levels that come out.
        bounds: Bounds in numbers of zeros.
        zeros: The budget.

    Returns:
        Levels in bits and numbers of zeros, one a layer.
    """
    budget = torch.tensor(zeros, dtype=torch.float64, device=scores.keys.device)
    common, at = _common(scores, bounds, budget)
    below, upto = at(common - 1), at(common)
    due = bounds.clamp(below).tolist()
    _fill(due, bounds.clamp(upto).tolist(), range(len(due)), zeros)

    wanted = torch.tensor(due, dtype=torch.float64, device=budget.device)
    held = (wanted < below) | (wanted > upto)
    own = torch.where(held, bisect(at, wanted), common)[bounds.component]
    level = torch.minimum(own, bisect(scores.count, bounds.layer_max))
    most = torch.minimum(scores.count(own), bounds.layer_max).tolist()
    numbers = torch.minimum(scores.count(own - 1), bounds.layer_max).tolist()
    for c, number in enumerate(due):
        members = (bounds.component == c).nonzero().squeeze(1).tolist()
        _fill(numbers, most, members, number)
    return level.tolist(), [int(k) for k in numbers]


def _fill(numbers: list[float], most: list[float], order: Sequence[int], wanted: float) -> None:
    """Raise the `numbers` in `order` toward `most`, first come first served, to sum to `wanted`."""
    missing = wanted - sum(numbers[i] for i in order)
    for i in order:
        extra = min(missing, most[i] - numbers[i])
        numbers[i] += extra
        missing -= extra


def to_bits(scores: Tensor) -> Tensor:
    """Bits of float32 scores as int64, ordered as the scores are; negative ones are all alike."""
    return (scores.view(torch.int32).long() + 1).clamp(0, _MAX_BITS)


def from_bits(level: Tensor) -> Tensor:
    """The float32 numbers with these bits, (L,); 0 for the levels that prune nothing new."""
    return (level - 1).clamp(min=0).to(torch.int32).view(torch.float32)


def pruned(scores: Tensor, level: int, zeros: int) -> Tensor:
    """Mark the pruned weights of one layer, given `select`'s answer for it: bool, flat."""
    bits = to_bits(scores)
    gone = bits < level
    missing = zeros - int(gone.sum())
    gone[(bits == level).nonzero().squeeze(1)[:missing]] = True
    return gone
