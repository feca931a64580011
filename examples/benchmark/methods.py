"""The methods that are compared: what each passes to `apply_adapmtl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch_adapmtl.methods import SNIP, DiSparse, IterativeMagnitude, Magnitude, Taylor
from examples.benchmark.problem import Problem
from torch_adapmtl.budget.solver import SparsitySchedule
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.weighting.simple import StabilityWeighting, make_weighting

__all__ = ["BASELINES", "DENSE", "METHODS", "SETTINGS", "UNAIMED", "VARIANTS"]

Options = dict[str, Any]

#: The method that prunes nothing; what the others are compared with.
DENSE = "dense"

#: The library's default method, which is not the published algorithm.
OURS = "adaptive (ours)"

#: The same, but pruned weights learn until the zeros are fixed.
REGROW = "adaptive, regrow until 90 %"

#: The same with the schedule that was the default before.
EARLIER = "adaptive, fixed at 70 %"

#: The algorithm of the AdapMTL paper.
PUBLISHED = "AdapMTL as published"

#: The same with the task weights of the authors' code, which differ from those of the paper's text.
PUBLISHED_CODE = "AdapMTL as published, code's weighting"

_ONCE = SparsitySchedule(start=0.5, end=0.5)


def _ours(weighting: str = "stability", **changed: Any) -> Callable[[Problem], Options]:
    """The library's defaults, but for what is given."""
    return lambda _: {"weighting": weighting, **changed}


#: Methods of others, with equal task weights.
BASELINES: Mapping[str, Callable[[Problem], Options]] = {
    "uniform magnitude": lambda _: {"mode": Magnitude("uniform")},
    "global magnitude": lambda _: {"mode": Magnitude()},
    "one-shot": lambda _: {"mode": Magnitude(schedule=_ONCE)},
    "IMP": lambda _: {"mode": IterativeMagnitude()},
    "LTH": lambda _: {"mode": IterativeMagnitude(rounds=1, rewind=True)},
    "SNIP": lambda _: {"mode": SNIP()},
    "DiSparse": lambda _: {"mode": DiSparse()},
    "DiSparse dynamic": lambda _: {"mode": DiSparse(dynamic=True)},
    "Taylor": lambda _: {"mode": Taylor()},
}

#: The default method, the published algorithm, and the default with one or two parts changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    OURS: _ours(),
    REGROW: _ours(schedule=SparsitySchedule(regrow_until=0.9)),
    PUBLISHED: lambda problem: {
        "mode": problem.paper,
        "weighting": "stability",
    },
    PUBLISHED_CODE: lambda problem: {
        "mode": problem.paper,
        "weighting": "deviation",
    },
    EARLIER: _ours(schedule=SparsitySchedule(settled=0.7, regrow_until=0.7)),
    "adaptive, common threshold": _ours(allocation="common"),
    "adaptive, by sensitivity": _ours(allocation="sensitivity"),
    "adaptive, by gradient": _ours(allocation="gradient"),
    "adaptive, equal weights": _ours("equal"),
    "adaptive, common threshold, equal weights": _ours("equal", allocation="common"),
    "adaptive, code's weighting": _ours("deviation"),
}


#: Methods whose sparsity at the end does not depend on the target.
UNAIMED = (DENSE, PUBLISHED, PUBLISHED_CODE)


def _weighting(window: float, start: float) -> Callable[[Problem], Options]:
    """The window and the start of the weighting multiplied."""

    def make(problem: Problem) -> Options:
        tasks = list(problem.make_tasks())
        default = make_weighting("stability", tasks, problem.steps)
        assert isinstance(default, StabilityWeighting)
        weighting = StabilityWeighting(
            tasks, window=round(window * default.window), start=round(start * default.start)
        )
        return {"weighting": weighting}

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
    "fixed at 50 %": _ours(schedule=SparsitySchedule(settled=0.5)),
    "regrow until 50 %": _ours(schedule=SparsitySchedule(regrow_until=0.5)),
    "rate 0.1": _ours(allocation=LAMPAllocation(rate=0.1)),
    "rate 1": _ours(allocation=LAMPAllocation(rate=1.0)),
    "strength 0.5": _ours(allocation=LAMPAllocation(strength=0.5)),
    "strength 1": _ours(allocation=LAMPAllocation(strength=1.0)),
    "by component": _ours(granularity="component"),
    "reach 1.5": _ours(reach=1.5),
    "reach inf": _ours(reach=math.inf),
    "mask gradient": _ours(gradient="mask"),
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **VARIANTS,
    **SETTINGS,
}
