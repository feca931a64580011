"""The methods that are compared: what each passes to `apply_adapmtl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from examples.benchmark.candidates import SHAPES, Shaped
from examples.benchmark.problem import Problem
from torch_adapmtl import (
    ACDC,
    SNIP,
    ST3,
    STR,
    Adaptive,
    DiSparse,
    Feather,
    GraNet,
    IterativeMagnitude,
    LAMPAllocation,
    Magnitude,
    Paper,
    RigL,
    SparsitySchedule,
    StabilityWeighting,
    Taylor,
    TopKAST,
)

__all__ = [
    "BASELINES",
    "CANDIDATES",
    "DENSE",
    "MACS",
    "METHODS",
    "PAIRS",
    "SETTINGS",
    "VARIANTS",
    "WEIGHTED",
]

Options = dict[str, Any]

#: The method that prunes nothing; what the others are compared with.
DENSE = "dense"

#: The library's default method, which is not the published algorithm.
OURS = "adaptive (ours)"

#: The same, but pruned weights learn until the zeros are fixed.
REGROW = "adaptive, regrow until 90 %"

#: The same with the threshold that was the default before: firm, and without a scale.
EARLIER = "adaptive, firm"

#: The algorithm of the AdapMTL paper.
PUBLISHED = "AdapMTL as published"

#: The same with the task weights of the authors' code, which differ from those of the paper's text.
PUBLISHED_CODE = "AdapMTL as published, code's weighting"

_ONCE = SparsitySchedule(start=0.5, end=0.5)


def _ours(weighting: str = "stability", **changed: Any) -> Callable[[Problem], Options]:
    """The library's defaults, but for what is given."""
    return lambda _: {"weighting": weighting, "method": Adaptive(**changed)}


#: Methods of others, with equal task weights.
BASELINES: Mapping[str, Callable[[Problem], Options]] = {
    "uniform magnitude": lambda _: {"method": Magnitude("uniform")},
    "global magnitude": lambda _: {"method": Magnitude()},
    "one-shot": lambda _: {"method": Magnitude(schedule=_ONCE)},
    "IMP": lambda _: {"method": IterativeMagnitude()},
    "LTH": lambda _: {"method": IterativeMagnitude(rounds=1, rewind=True)},
    "SNIP": lambda _: {"method": SNIP()},
    "DiSparse": lambda _: {"method": DiSparse()},
    "DiSparse dynamic": lambda _: {"method": DiSparse(dynamic=True)},
    "Taylor": lambda _: {"method": Taylor()},
    # These train sparse.
    "RigL": lambda _: {"method": RigL()},
    "AC/DC": lambda _: {"method": ACDC()},
    "GraNet": lambda _: {"method": GraNet()},
    "Top-KAST": lambda _: {"method": TopKAST()},
    # These shrink the remaining weights.
    "ST-3": lambda _: {"method": ST3()},
    "Feather": lambda _: {"method": Feather()},
    # The pair was found for the paper's thresholds, which rise in the same way.
    "STR": lambda problem: {"method": STR(problem.paper.start, problem.paper.weight_decay)},
}


def _weighted(make: Callable[[Problem], Options]) -> Callable[[Problem], Options]:
    return lambda problem: {**make(problem), "weighting": "stability"}


#: The same with the task weights of the default method.
WEIGHTED: Mapping[str, Callable[[Problem], Options]] = {
    f"{name}, stability weights": _weighted(make) for name, make in BASELINES.items()
}

#: The default method, the published algorithm, and the default with one or two parts changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    OURS: _ours(),
    REGROW: _ours(schedule=SparsitySchedule(regrow_until=0.9)),
    PUBLISHED: lambda problem: {"method": problem.paper, "weighting": "stability"},
    PUBLISHED_CODE: lambda problem: {"method": problem.paper, "weighting": "deviation"},
    EARLIER: _ours(reach=1.1),
    "adaptive, soft": _ours(reach=math.inf),
    "adaptive, common threshold": _ours(allocation="common"),
    "adaptive, by sensitivity": _ours(allocation="sensitivity"),
    "adaptive, by gradient": _ours(allocation="gradient"),
    "adaptive, equal weights": _ours("equal"),
    "adaptive, common threshold, equal weights": _ours("equal", allocation="common"),
    "adaptive, code's weighting": _ours("deviation"),
}


def _published(start: float, weight_decay: float) -> Callable[[Problem], Options]:
    return lambda _: {"method": Paper(start, weight_decay), "weighting": "stability"}


#: The published algorithm with the pairs of start and decay that were tried, alike on all problems.
PAIRS: Mapping[str, Callable[[Problem], Options]] = {
    f"{PUBLISHED}, start {start:g}, decay {decay:g}": _published(start, decay)
    for start in (-6.0, -5.0, -4.0, -3.0)
    for decay in (0.1, 1.0)
}


def _weighting(window: float, start: float) -> Callable[[Problem], Options]:
    """The window and the start of the default weighting multiplied."""

    def make(problem: Problem) -> Options:
        weighting = StabilityWeighting(
            list(problem.make_tasks()),
            window=round(window * max(10, min(500, problem.steps // 40))),
            start=round(start * (problem.steps // 4)),
        )
        return {"weighting": weighting, "method": Adaptive()}

    return make


#: The default method with one number changed.
SETTINGS: Mapping[str, Callable[[Problem], Options]] = {
    "window x 1/2": _weighting(0.5, 1),
    "window x 4": _weighting(4, 1),
    "weighting from the start": _weighting(1, 0),
    "weighting from half the run": _weighting(1, 2),
    "pruning from 0 %": _ours(schedule=SparsitySchedule(start=0.0)),
    "pruning from 20 %": _ours(schedule=SparsitySchedule(start=0.2)),
    "pruned by 35 %": _ours(schedule=SparsitySchedule(end=0.35)),
    "pruned by 65 %": _ours(schedule=SparsitySchedule(end=0.65)),
    "fixed at 50 %": _ours(schedule=SparsitySchedule(fix_at=0.5)),
    "regrow until 50 %": _ours(schedule=SparsitySchedule(regrow_until=0.5)),
    "rate 0.1": _ours(allocation=LAMPAllocation(rate=0.1)),
    "rate 1": _ours(allocation=LAMPAllocation(rate=1.0)),
    "strength 0.5": _ours(allocation=LAMPAllocation(strength=0.5)),
    "strength 1": _ours(allocation=LAMPAllocation(strength=1.0)),
    "by component": _ours(granularity="component"),
    "reach 1.5": _ours(reach=1.5),
    "mask gradient": _ours(gradient="mask"),
}

#: The default method with a budget of multiply-adds, and powers of the positions.
MACS: Mapping[str, Callable[[Problem], Options]] = {
    f"adaptive, macs, power {power}": lambda problem, power=power: {  # type: ignore[misc]
        **_ours(position_power=power)(problem),
        "count": "macs",
    }
    for power in (0.25, 0.125, 0.5)
}


def _shaped(shape: str, **changed: Any) -> Callable[[Problem], Options]:
    return lambda _: {"weighting": "stability", "method": Shaped(shape=shape, **changed)}


#: Candidates for the default method.
CANDIDATES: Mapping[str, Callable[[Problem], Options]] = {
    **{shape: _shaped(shape) for shape in SHAPES},
    "soft, magnitude of the layer, at updates": _shaped(
        "soft, magnitude of the layer", renewed="updates"
    ),
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **WEIGHTED,
    **VARIANTS,
    **PAIRS,
    **SETTINGS,
    **MACS,
    **CANDIDATES,
}
