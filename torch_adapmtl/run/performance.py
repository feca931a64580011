"""The paper's relative performance of a multi-task model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

__all__ = ["RelativePerformance", "relative_performance"]


@dataclass(frozen=True)
class RelativePerformance:
    """Relative performance of a multi-task model, in percent; higher is better.

    Attributes:
        delta: Delta_T, the mean of `tasks`.
        tasks: Delta_Tt of each task, the sum of its `metrics`.
        metrics: Change of each metric of each task, with the sign reversed if lower is better.
    """

    delta: float
    tasks: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        width = max(map(len, [*self.tasks, "overall"]))
        rows = [f"{task:<{width}}  {delta:+8.2f} %" for task, delta in self.tasks.items()]
        return "\n".join([*rows, f"{'overall':<{width}}  {self.delta:+8.2f} %"])


def relative_performance(
    metrics: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    *,
    lower_is_better: Collection[str | tuple[str, str]],
) -> RelativePerformance:
    r"""Compare a multi-task model with a baseline: Delta_T of AdapMTL (arXiv 2408.03913).

    With \(M_j\) and \(B_j\) the value of metric j of task t for the model and the baseline, and
    \(l_j = 1\) where lower is better, else 0:

    $$\Delta_{T_t} = 100 \sum_j (-1)^{l_j} \frac{M_j - B_j}{|B_j|}, \qquad
    \Delta_T = \frac1T \sum_t \Delta_{T_t}$$

    The changes of a task's metrics are *summed*, so a task with more metrics has a larger effect.
    The paper divides by \(B_j\). For its metrics, which are positive, the magnitude gives the same
    result; for negative metrics it keeps the sign of an improvement positive.

    Args:
        metrics: The model's metrics, ``{task: {metric: value}}``, each in any unit.
        baseline: The same metrics of the baseline, which is the dense multi-task model in the
            paper.
        lower_is_better: The metrics for which lower values are better: a name, for every task
            that has the metric, or a pair ``(task, name)``. Pass ``()`` if there are none.

    Returns:
        The changes per metric, per task and overall, in percent.

    Raises:
        ValueError: If tasks or metrics differ, a value is not finite, a baseline is 0, or an
            entry of `lower_is_better` matches nothing.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> change = relative_performance(
        ...     {"seg": {"miou": 0.42}, "depth": {"abs_err": 0.66}},
        ...     {"seg": {"miou": 0.40}, "depth": {"abs_err": 0.60}},
        ...     lower_is_better=["abs_err"],
        ... )
        >>> print(change)
        seg         +5.00 %
        depth      -10.00 %
        overall     -2.50 %
    """
    if isinstance(lower_is_better, str):
        raise TypeError(
            f"lower_is_better must be a collection of metrics, got the string "
            f"{lower_is_better!r}; pass [{lower_is_better!r}]"
        )
    _check_same("tasks", metrics, baseline)
    known: set[str | tuple[str, str]] = set()
    changes: dict[str, dict[str, float]] = {}
    for task, values in metrics.items():
        _check_same(f"metrics of task {task!r}", values, baseline[task])
        changes[task] = {}
        for name in values:
            known |= {name, (task, name)}
            value = _number(f"metrics[{task!r}][{name!r}]", values[name])
            base = _number(f"baseline[{task!r}][{name!r}]", baseline[task][name])
            if base == 0:
                raise ValueError(
                    f"baseline[{task!r}][{name!r}] is 0, so no change is relative to it; leave "
                    "this metric out of both"
                )
            sign = -1 if name in lower_is_better or (task, name) in lower_is_better else 1
            changes[task][name] = sign * 100 * (value - base) / abs(base)
    if unmatched := [entry for entry in lower_is_better if entry not in known]:
        raise ValueError(
            f"lower_is_better has {unmatched}, which no task has; the metrics are "
            f"{ {task: list(values) for task, values in metrics.items()} }"
        )
    tasks = {task: sum(values.values()) for task, values in changes.items()}
    return RelativePerformance(sum(tasks.values()) / len(tasks), tasks, changes)


def _check_same(what: str, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    for name, argument in (("metrics", metrics), ("baseline", baseline)):
        if not isinstance(argument, Mapping):
            raise TypeError(
                f"{name} must be a mapping {{task: {{metric: value}}}}; for the {what} it holds "
                f"{argument!r}"
            )
    missing = [name for name in baseline if name not in metrics]
    extra = [name for name in metrics if name not in baseline]
    if missing or extra:
        raise ValueError(
            f"{what} differ: metrics lacks {missing}, baseline lacks {extra}; compare the same "
            "ones, or leave them out of both"
        )
    if not metrics:
        raise ValueError(f"there are no {what} to compare")


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
