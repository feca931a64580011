"""`make_weighting`: from the argument `weighting` to a loss weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_adapmtl._checks import check_choice, check_count
from torch_adapmtl.weighting._base import LossWeighting
from torch_adapmtl.weighting.simple import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
    WeightFunction,
)
from torch_adapmtl.weighting.stability import StabilityWeighting

__all__ = ["make_weighting"]


def make_weighting(
    spec: str | Mapping[str, float] | WeightFunction | LossWeighting,
    tasks: Sequence[str],
    total_steps: int,
) -> LossWeighting:
    """Make a loss weighting from the argument `weighting` of `apply_adapmtl`.

    Args:
        spec: `"stability"`: `StabilityWeighting` as in the paper's text. `"deviation"`: the same
            with the direction of the authors' code. Both have a window of `total_steps // 40` (at
            least 10, at most 500) and start after `total_steps // 4` steps, in proportion to the
            paper's 500 and 5,000 of 20,000. `"equal"`: `EqualWeighting`. A mapping:
            `FixedWeighting`. A callable: `CallableWeighting`. A `LossWeighting` is returned
            unchanged.
        tasks: The task names, without duplicates.
        total_steps: Number of steps of the run.

    Returns:
        The weighting. Its buffers are on the CPU, unless `spec` is a `LossWeighting`.

    Raises:
        ValueError: If the name is unknown, or a `LossWeighting` has other tasks.
        TypeError: If `spec` is of another type.

    Example:
        >>> make_weighting("stability", ["seg", "depth"], 20_000).window
        500
    """
    check_count("total_steps", total_steps)
    if isinstance(spec, LossWeighting):
        if set(spec.tasks) != set(tasks):
            raise ValueError(
                f"weighting was made for the tasks {list(spec.tasks)}, the model has "
                f"{list(tasks)}: make it for these"
            )
        return spec
    if isinstance(spec, str):
        check_choice("weighting", spec, ("stability", "deviation", "equal"))
        if spec == "equal":
            return EqualWeighting(tasks)
        return StabilityWeighting(
            tasks,
            window=max(10, min(500, total_steps // 40)),
            start=total_steps // 4,
            direction="stable" if spec == "stability" else "deviating",
        )
    if isinstance(spec, Mapping):
        return FixedWeighting(tasks, spec)
    function: object = spec
    if callable(function) and not isinstance(function, type):  # a class is callable too
        return CallableWeighting(tasks, function)
    raise TypeError(
        "weighting must be 'stability', 'deviation', 'equal', a mapping from task to weight, a "
        f"callable or a LossWeighting instance, got {spec!r}"
    )
