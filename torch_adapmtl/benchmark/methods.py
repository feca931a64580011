"""The methods that are compared: what each passes to `apply_adapmtl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch_adapmtl.baselines import SNIP, DiSparse, IterativeMagnitude, Magnitude, Taylor
from torch_adapmtl.benchmark.problem import Problem
from torch_adapmtl.budget import SparsitySchedule
from torch_adapmtl.lamp import LAMPAllocation
from torch_adapmtl.weighting import StabilityWeighting, make_weighting

__all__ = ["BASELINES", "DENSE", "METHODS", "SETTINGS", "UNAIMED", "VARIANTS"]

Options = dict[str, Any]

#: The method that prunes nothing; what the others are compared with.
DENSE = "dense"

#: The method that is compared with the others.
OURS = "AdapMTL"

#: The same with pruned weights that learn until the zeros settle.
REGROW = "AdapMTL, regrow until 90 %"

#: The same with the schedule that it had before, which its other variants are run with.
EARLIER = "AdapMTL, settled at 70 %"

_ONCE = SparsitySchedule(start=0.5, end=0.5)


def _earlier(
    weighting: str = "stability",
    *,
    start: float = 0.05,
    end: float = 0.5,
    settled: float = 0.7,
    **options: Any,
) -> Callable[[Problem], Options]:
    """The earlier default, whose zeros settle at 70 % and regrow until then, changed in a part."""
    schedule = SparsitySchedule(start=start, end=end, settled=settled, regrow_until=settled)
    return lambda _: {"schedule": schedule, "weighting": weighting, **options}


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

#: AdapMTL with the library's defaults, with another schedule, in the paper's mode, and the earlier
#: default with one part of it changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    OURS: lambda _: {"weighting": "stability"},
    REGROW: lambda _: {
        "schedule": SparsitySchedule(regrow_until=0.9),
        "weighting": "stability",
    },
    "AdapMTL, paper mode": lambda problem: {
        "mode": problem.paper,
        "weighting": "stability",
    },
    "AdapMTL, paper mode, code's weighting": lambda problem: {
        "mode": problem.paper,
        "weighting": "deviation",
    },
    EARLIER: _earlier(),
    "AdapMTL, common threshold": _earlier(allocation="common"),
    "AdapMTL, strength 0.5": _earlier(allocation=LAMPAllocation(strength=0.5)),
    "AdapMTL, by sensitivity": _earlier(allocation="sensitivity"),
    "AdapMTL, by gradient": _earlier(allocation="gradient"),
    "AdapMTL, equal weights": _earlier("equal"),
    "AdapMTL, common threshold, equal weights": _earlier("equal", allocation="common"),
    "AdapMTL, code's weighting": _earlier("deviation"),
}


#: Methods that end where they end, whatever sparsity is asked for.
UNAIMED = (DENSE, "AdapMTL, paper mode", "AdapMTL, paper mode, code's weighting")


def _weighting(window: float, start: float) -> Callable[[Problem], Options]:
    """The earlier default, with the window and the start of its weighting multiplied."""

    def make(problem: Problem) -> Options:
        tasks = list(problem.make_tasks())
        default = make_weighting("stability", tasks, problem.steps)
        assert isinstance(default, StabilityWeighting)
        weighting = StabilityWeighting(
            tasks, window=round(window * default.window), start=round(start * default.start)
        )
        return {**_earlier()(problem), "weighting": weighting}

    return make


#: The earlier default with one number changed.
SETTINGS: Mapping[str, Callable[[Problem], Options]] = {
    "window x 1/2": _weighting(0.5, 1),
    "window x 4": _weighting(4, 1),
    "weighting from the start": _weighting(1, 0),
    "weighting from half the run": _weighting(1, 2),
    "pruning from 0 %": _earlier(start=0.0),
    "pruning from 20 %": _earlier(start=0.2),
    "pruned by 35 %": _earlier(end=0.35),
    "pruned by 65 %": _earlier(end=0.65),
    "settled at 50 %": _earlier(settled=0.5),
    "rate 0.1": _earlier(allocation=LAMPAllocation(rate=0.1)),
    "rate 1": _earlier(allocation=LAMPAllocation(rate=1.0)),
    "strength 1": _earlier(allocation=LAMPAllocation(strength=1.0)),
    "by component": _earlier(granularity="component"),
    "reach 1.5": _earlier(reach=1.5),
    "reach inf": _earlier(reach=math.inf),
    "mask gradient": _earlier(gradient="mask"),
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **VARIANTS,
    **SETTINGS,
}
