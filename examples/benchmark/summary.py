"""Summaries of a study's runs: means over seeds, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.benchmark.methods import DENSE
from torch_adapmtl import RelativePerformance, relative_performance

__all__ = ["Estimate", "Margin", "Row", "differences", "margin", "summarize"]

Run = Mapping[str, Any]

# A problem, a seed and a machine.
_Place = tuple[str, int, str]

# What runs must share to be compared.
_TRAINING = ("problem", "steps", "batch", "lr", "weight_decay", "device", "bf16")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error, the standard deviation (n - 1) over the root of n; NaN of one.
        count: How many seeds.

    Example:
        >>> print(Estimate.of([1.0, 2.0, 3.0]))
        2.00 ± 0.58
    """

    mean: float
    error: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Make it from the values, at least one."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return Estimate(mean, math.nan, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return Estimate(mean, math.sqrt(variance / n), n)

    def __str__(self) -> str:
        return self.format(".2f")

    def format(self, spec: str) -> str:
        """The mean and, if there is one, the error, both in the format `spec`."""
        mean = format(self.mean, spec)
        if math.isnan(self.error):
            return mean
        return f"{mean} ± {format(self.error, spec.lstrip('+'))}"


@dataclass(frozen=True)
class Row:
    """The runs of a method at a sparsity on a problem.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        sparsity: The target, as a fraction.
        seeds: The seeds that have a dense run of the same machine to compare with, in order.
        delta: Delta_T against the dense model of the same seed, in percent; None for the dense
            model.
        by_seed: The same for each of `seeds`.
        tasks: Delta of each task, in percent.
        metrics: Each metric of each task.
        components: Sparsity of each component, as a fraction.
        components_by_seed: The same for each of `seeds`.
        reached: Sparsity at the end of the run, as a fraction.
    """

    problem: str
    method: str
    sparsity: float
    seeds: tuple[int, ...]
    delta: Estimate | None
    by_seed: Mapping[int, float]
    tasks: Mapping[str, Estimate]
    metrics: Mapping[str, Mapping[str, Estimate]]
    components: Mapping[str, Estimate]
    components_by_seed: Mapping[int, Mapping[str, float]]
    reached: Estimate

    @property
    def missed(self) -> bool:
        """Whether the runs ended more than half a percent of the weights away from the target."""
        return abs(self.reached.mean - self.sparsity) > 0.005


def summarize(runs: Iterable[Run]) -> list[Row]:
    """Group the runs by problem, method and sparsity, in the order in which they first come.

    Each is compared with the dense run of its seed on its machine: processors sum in different
    orders, and training amplifies rounding errors. Runs that failed, or whose dense run is missing,
    are left out.

    Args:
        runs: Lines of a study, as `read` returns them.

    Raises:
        ValueError: If a run is there twice, or the runs of a problem were not trained alike.

    Example:
        >>> from dataclasses import replace
        >>> from examples.benchmark import find_problem, run, summarize
        >>> short = replace(find_problem("teachers"), steps=10)
        >>> rows = summarize(
        ...     run(short, name, 0.9, seed=0) for name in ("dense", "Taylor")
        ... )
        >>> [(row.method, row.seeds, round(row.reached.mean, 3)) for row in rows]
        [('dense', (0,), 0.0), ('Taylor', (0,), 0.9)]
    """
    dense: dict[_Place, Run] = {}
    groups: dict[tuple[str, str, float], dict[int, Run]] = {}
    training: dict[str, list[Any]] = {}
    for run in runs:
        if "failed" in run:
            continue
        shared = [run[name] for name in _TRAINING]
        if training.setdefault(run["problem"], shared) != shared:
            raise ValueError(
                f"the runs of {run['problem']!r} were not trained alike: {_TRAINING} are "
                f"{training[run['problem']]} and {shared}; take the lines of one kind out of the "
                "file"
            )
        group = groups.setdefault((run["problem"], run["method"], run["sparsity"]), {})
        is_dense = run["method"] == DENSE
        other = dense.get(_place(run)) if is_dense else group.get(run["seed"])
        if other is not None:
            raise ValueError(
                f"two runs of {run['method']!r} on {run['problem']!r} at {run['sparsity']} have "
                f"the seed {run['seed']}, with the configs {other['config']} and "
                f"{run['config']}: take the lines of one of them out of the file"
            )
        if is_dense:
            dense[_place(run)] = run
        group.setdefault(run["seed"], run)
    rows = []
    for (problem, method, sparsity), group in groups.items():
        seeds = tuple(sorted(seed for seed, run in group.items() if _place(run) in dense))
        if seeds:
            chosen = [group[seed] for seed in seeds]
            against = [dense[_place(run)] for run in chosen]
            rows.append(_row(problem, method, sparsity, seeds, chosen, against))
    return rows


def _place(run: Run) -> _Place:
    return run["problem"], run["seed"], run.get("machine", "")


def _row(
    problem: str,
    method: str,
    sparsity: float,
    seeds: tuple[int, ...],
    runs: Sequence[Run],
    dense: Sequence[Run],
) -> Row:
    compared = [_relative(run, base) for run, base in zip(runs, dense, strict=True)]
    first = runs[0]
    return Row(
        problem,
        method,
        sparsity,
        seeds,
        None if method == DENSE else Estimate.of([change.delta for change in compared]),
        {seed: change.delta for seed, change in zip(seeds, compared, strict=True)},
        {
            task: Estimate.of([change.tasks[task] for change in compared])
            for task in first["metrics"]
        },
        {
            task: {
                name: Estimate.of([run["metrics"][task][name] for run in runs]) for name in metrics
            }
            for task, metrics in first["metrics"].items()
        },
        {
            name: Estimate.of([run["components"][name] for run in runs])
            for name in first["components"]
        },
        {seed: run["components"] for seed, run in zip(seeds, runs, strict=True)},
        Estimate.of([run["reached"] for run in runs]),
    )


def _relative(run: Run, dense: Run) -> RelativePerformance:
    lower = [(task, metric) for task, metric in run["lower_is_better"]]
    try:
        return relative_performance(run["metrics"], dense["metrics"], lower_is_better=lower)
    except ValueError as error:
        raise ValueError(
            f"the run of {run['method']!r} on {run['problem']!r} at {run['sparsity']} with seed "
            f"{run['seed']} cannot be compared with the dense one: {error}"
        ) from error


def differences(row: Row, reference: Row) -> list[float]:
    """Delta_T of a row minus that of another, in points, for each seed that both have."""
    shared = [seed for seed in reference.seeds if seed in row.by_seed]
    return [row.by_seed[seed] - reference.by_seed[seed] for seed in shared]


@dataclass(frozen=True)
class Margin:
    """How far a method is above the best of others, on a problem at a sparsity.

    Attributes:
        rival: The best of the others, by its mean over the same seeds.
        ahead: The difference of the two Delta_T, seed by seed, in points; negative if behind.
    """

    rival: str
    ahead: Estimate


def margin(
    rows: Iterable[Row], method: str, others: Iterable[str], *, problem: str, sparsity: float
) -> Margin | None:
    """Compare a method with the best of others, seed by seed.

    Args:
        rows: What `summarize` returned.
        method: The method.
        others: The names of the others.
        problem: On which problem.
        sparsity: At which sparsity.

    Returns:
        The margin, or None if there are no runs to compare.
    """
    here = {row.method: row for row in rows if row.problem == problem and row.sparsity == sparsity}
    row = here.get(method)
    rivals = [
        here[name]
        for name in others
        if name in here and row is not None and set(row.seeds) <= set(here[name].seeds)
    ]
    if row is None or not rivals:
        return None
    ahead = {rival.method: Estimate.of(differences(row, rival)) for rival in rivals}
    best = min(ahead, key=lambda name: ahead[name].mean)
    return Margin(best, ahead[best])
