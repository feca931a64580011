"""Loss weighting by the fluctuation of the losses in a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torch_adapmtl._checks import check_choice, check_count, check_numbers
from torch_adapmtl.weighting._base import LossWeighting

__all__ = ["StabilityWeighting"]

# A deviation below this is float32 rounding, not information; it also keeps 1/deviation finite.
_FLOOR = 1e-6
# Larger relative changes are clamped to this, so that sums over the window stay finite.
_CAP = 1e6
# Replaces 0 as a divisor.
_TINY = 1e-30


class StabilityWeighting(LossWeighting):
    r"""Weights tasks by how much their losses fluctuate in a sliding window (AdapMTL, Section 3).

    The deviation of a task over its last `window` losses \(L_1, …, L_n\) is

    - ``"relative_change"``: the mean of \(|L_i - L_{i-1}| / |L_i|\), as in the authors' code;
    - ``"coefficient_of_variation"``: their (population) standard deviation over their |mean|.

    Both are scale-free: multiplying a task's loss by a constant changes nothing. The paper's text
    and the authors' code disagree on the direction, so both are available:

    - ``"stable"`` (the text): the weight is proportional to 1 / deviation;
    - ``"deviating"`` (the code): the weight is proportional to the deviation.

    The weights are scaled to sum to T and then pulled toward equal weights,
    ``1 + c * (weight - 1)`` with the largest c in [0, 1] that brings all of them within `bounds`;
    the sum stays T. Without bounds, a task that cannot be learned has a flat loss and would get
    nearly all the weight.

    Corner cases:

    - A task with fewer than two losses in its window has weight 1, and the other tasks share the
      rest.
    - Deviations below 1e-6 count as 1e-6. If all losses are constant, the weights are equal.
    - A loss of exactly 0 says that the batch has no labels for the task: it does not enter the
      window, as a missing one does not.
    - A single relative change counts as at most 1e6.
    - Losses beyond ±8.5e37 (a quarter of float32's range) are clamped to that.

    A step is one call in training mode with gradients enabled; under gradient accumulation, every
    micro-batch is a step. The window includes the loss of the present step. If several processes
    train together, the losses of a step are averaged over the processes that have the task, so that
    all processes have the same weights.

    Args:
        tasks: The task names, without duplicates.
        window: Length of the sliding window, in steps; at least 2. The paper uses 500.
        start: Number of steps at the beginning in which all weights are 1. The windows fill
            meanwhile. The paper uses 5,000 of 20,000.
        direction: ``"stable"`` or ``"deviating"``, see above.
        deviation: ``"relative_change"`` or ``"coefficient_of_variation"``, see above.
        bounds: Smallest and largest weight, ``lower <= 1 <= upper``; None for no bounds.
        strict: See `LossWeighting`.

    Attributes:
        history: The windows, float32 of shape (T, window), newest last.
        counts: Number of losses stored so far for each task, int64 of shape (T,).
        steps: Number of steps so far, int64 of shape ().
        seen: The step of each task's last stored loss, int64 of shape (T,); 0 for never.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `bounds` is not a pair of numbers.

    Example:
        >>> weighting = StabilityWeighting(
        ...     ["calm", "wild"], window=10, start=0, bounds=None
        ... )
        >>> for step in range(10):
        ...     wild = torch.tensor(3.0 if step % 2 else 1.0, requires_grad=True)
        ...     total = weighting({"calm": torch.tensor(0.9**step), "wild": wild})
        >>> total.backward()
        >>> weighting.as_dict()["calm"] > 1.8
        True
    """

    history: Tensor
    counts: Tensor
    steps: Tensor
    seen: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        window: int,
        start: int,
        direction: Literal["stable", "deviating"] = "stable",
        deviation: Literal["relative_change", "coefficient_of_variation"] = "relative_change",
        bounds: tuple[float, float] | None = (0.5, 1.5),
        strict: bool = False,
    ) -> None:
        super().__init__(tasks, strict=strict)
        self.window = check_count("window", window, least=2)
        self.start = check_count("start", start, least=0)
        check_choice("direction", direction, ("stable", "deviating"))
        check_choice("deviation", deviation, ("relative_change", "coefficient_of_variation"))
        if bounds is not None:
            pair: object = bounds
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"bounds must be a pair (lower, upper), such as (0.5, 1.5), or None for no "
                    f"bounds, got {bounds!r}"
                )
            lower, upper = bounds
            check_numbers("bounds: ", lower=lower, upper=upper)
            if not 0 <= lower <= 1 <= upper < float("inf"):
                raise ValueError(
                    f"bounds must satisfy 0 <= lower <= 1 <= upper (equal weights are 1), got "
                    f"{bounds}; pass None for no bounds"
                )
            bounds = (float(lower), float(upper))
        self.direction = direction
        self.deviation = deviation
        self.bounds = bounds
        count = len(self.tasks)
        self.register_buffer("history", torch.zeros(count, window, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(count, dtype=torch.int64))

    def observe(self, losses: Tensor, accepted: Tensor) -> None:
        """Shift the accepted losses into the windows, and count the step."""
        shifted = torch.cat([self.history[:, 1:], losses[:, None]], dim=1)
        self.history.copy_(torch.where(accepted[:, None], shifted, self.history))
        self.counts += accepted
        self.steps += 1
        self.seen.copy_(torch.where(accepted, self.steps, self.seen))

    def unseen(self) -> dict[str, int]:
        """Return the tasks without a loss for longer than their window, and for how many steps.

        A task that has a loss in every k-th step fills its window in k times as many steps. So the
        window is measured in steps by the mean gap between the task's own losses, or those of the
        average task, whichever is longer.
        """
        count = len(self.tasks)
        numbers = torch.cat([self.steps[None], self.seen, self.counts]).tolist()  # one wait
        steps, seen, counts = numbers[0], numbers[1 : count + 1], numbers[count + 1 :]
        average = len(self.tasks) * steps / max(sum(counts), 1)
        rows = zip(self.tasks, seen, counts, strict=True)
        return {
            task: steps - last
            for task, last, count in rows
            if steps - last > self.window * max(last / max(count, 1), average)
        }

    def deviations(self) -> Tensor:
        """Deviation of each task's window, float32 of shape (T,); 0 for fewer than two losses."""
        # `masked_fill`, not `torch.where` with a number: older releases of torch copy the number
        # to the device and wait for it.
        age = torch.arange(self.window, 0, -1, device=self.device)  # of each slot; the newest is 1
        empty = age > self.counts[:, None]
        if self.deviation == "relative_change":
            before, after = self.history[:, :-1], self.history[:, 1:]
            change = ((after - before) / after).abs().clamp(max=_CAP)  # NaN in empty slots
            return change.masked_fill(empty[:, :-1], 0).sum(1) / (
                self.counts.clamp(2, self.window) - 1
            )
        filled = self.counts.clamp(1, self.window)
        losses = self.history.masked_fill(empty, 0)
        largest = losses.abs().amax(1, keepdim=True)
        losses = losses / largest.masked_fill(largest == 0, 1)  # sums and squares stay finite
        mean = losses.sum(1) / filled
        variance = (losses - mean[:, None]).masked_fill(empty, 0).square().sum(1) / filled
        return (variance.sqrt() / mean.abs()).nan_to_num(nan=0).clamp(max=_CAP)

    def weights(self) -> Tensor:
        """Weight of each task after the last step, float32 of shape (T,)."""
        raw = self.deviations().clamp(min=_FLOOR)
        if self.direction == "stable":
            raw = raw.reciprocal()
        ready = self.counts >= 2
        raw = raw * ready
        weights = raw * (ready.sum() / raw.sum())  # 0 / 0 if no task is ready; replaced below
        weights = weights.masked_fill(~ready | (self.steps <= self.start), 1)
        return weights if self.bounds is None else _shrink(weights, *self.bounds)

    def config(self) -> dict[str, Any]:
        """Return the settings."""
        return {
            **super().config(),
            "window": self.window,
            "start": self.start,
            "direction": self.direction,
            "deviation": self.deviation,
            "bounds": None if self.bounds is None else list(self.bounds),
        }

    def extra_repr(self) -> str:
        """Show the settings in the module's repr."""
        return (
            f"{super().extra_repr()}, window={self.window}, start={self.start}, "
            f"direction={self.direction!r}, deviation={self.deviation!r}, bounds={self.bounds}"
        )


def _shrink(weights: Tensor, lower: float, upper: float) -> Tensor:
    """Pull weights that sum to T toward 1, just enough for `lower <= weight <= upper`."""
    offset = weights - 1
    least, most = offset.aminmax()
    down = (upper - 1) / most.clamp(min=_TINY)
    up = (lower - 1) / least.clamp(max=-_TINY)
    factor = torch.minimum(down, up).clamp(max=1)
    return (1 + factor * offset).clamp(lower, upper)  # the clamp only removes rounding errors
