"""Methods compared over the problems of a suite: mean ranks, and margins with intervals."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.benchmark.summary import Row

__all__ = ["Interval", "mean_margin", "mean_ranks", "scores"]

#: Delta_T by problem, method and seed.
Scores = Mapping[str, Mapping[str, Mapping[int, float]]]


def scores(rows: Iterable[Row], methods: Sequence[str], sparsity: float) -> Scores:
    """Delta_T of some methods at a sparsity, with the seeds and on the problems that all have.

    A problem that one of the methods was not run on is left out.

    Args:
        rows: What `summarize` returned.
        methods: The methods.
        sparsity: The target, as a fraction.
    """
    found: dict[str, dict[str, Mapping[int, float]]] = {}
    for row in rows:
        if row.sparsity == sparsity and row.method in methods:
            found.setdefault(row.problem, {})[row.method] = row.by_seed
    compared = {}
    for problem, by_method in found.items():
        if len(by_method) < len(set(methods)):
            continue
        seeds = set.intersection(*(set(by_seed) for by_seed in by_method.values()))
        if seeds:
            compared[problem] = {
                method: {seed: by_seed[seed] for seed in sorted(seeds)}
                for method, by_seed in by_method.items()
            }
    return compared


def mean_ranks(found: Scores) -> dict[str, float]:
    """The rank of each method by its mean over the seeds, averaged over the problems; 1 is best.

    Args:
        found: What `scores` returned.

    Example:
        >>> mean_ranks(
        ...     {
        ...         "p": {"a": {0: 1.0}, "b": {0: 2.0}},
        ...         "q": {"a": {0: 3.0}, "b": {0: 3.0}},
        ...     }
        ... )
        {'a': 1.75, 'b': 1.25}
    """
    ranks: dict[str, float] = {}
    for by_method in found.values():
        means = {method: _mean(by_seed.values()) for method, by_seed in by_method.items()}
        for method, mean in means.items():
            better = sum(other > mean for other in means.values())
            equal = sum(other == mean for other in means.values())
            rank = better + (equal + 1) / 2
            ranks[method] = ranks.get(method, 0.0) + rank / len(found)
    return ranks


@dataclass(frozen=True)
class Interval:
    """A mean, and the 2.5th and 97.5th percentile of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def mean_margin(found: Scores, method: str, *, draws: int = 2000) -> Interval:
    """How far a method is ahead of the best other of each problem, in points, over the problems.

    The bootstrap is paired: each draw takes as many problems as there are, with replacement, and
    for each of them as many of its seeds, which are the same for all methods. The best other is
    chosen anew in each draw, so that the interval contains the luck of that choice too.

    Args:
        found: What `scores` returned.
        method: The method.
        draws: How often to draw.

    Example:
        >>> print(
        ...     mean_margin({"p": {"a": {0: 1.0, 1: 2.0}, "b": {0: 0.5, 1: 1.5}}}, "a")
        ... )
        +0.50 [+0.50, +0.50]
    """
    generator = random.Random(0)
    problems = list(found)

    def margin(problem: str, seeds: Sequence[int]) -> float:
        means = {m: _mean(by_seed[s] for s in seeds) for m, by_seed in found[problem].items()}
        return means[method] - max(mean for name, mean in means.items() if name != method)

    seeds = {problem: list(found[problem][method]) for problem in problems}
    drawn = sorted(
        _mean(
            margin(problem, generator.choices(seeds[problem], k=len(seeds[problem])))
            for problem in generator.choices(problems, k=len(problems))
        )
        for _ in range(draws)
    )
    return Interval(
        _mean(margin(problem, seeds[problem]) for problem in problems),
        drawn[round(0.025 * (draws - 1))],
        drawn[round(0.975 * (draws - 1))],
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
