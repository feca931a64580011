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

#: The same with zeros that settle later.
LATER = "AdapMTL, settled at 90 %"

_ONCE = SparsitySchedule(start=0.5, end=0.5)

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

#: AdapMTL with the library's defaults, and with one part of it changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    OURS: lambda _: {"weighting": "stability"},
    LATER: lambda _: {"schedule": SparsitySchedule(settled=0.9), "weighting": "stability"},
    "AdapMTL, paper mode": lambda problem: {
        "mode": problem.paper,
        "weighting": "stability",
    },
    "AdapMTL, paper mode, code's weighting": lambda problem: {
        "mode": problem.paper,
        "weighting": "deviation",
    },
    "AdapMTL, common threshold": lambda _: {"allocation": "common", "weighting": "stability"},
    "AdapMTL, strength 0.5": lambda _: {
        "allocation": LAMPAllocation(strength=0.5),
        "weighting": "stability",
    },
    "AdapMTL, by sensitivity": lambda _: {"allocation": "sensitivity", "weighting": "stability"},
    "AdapMTL, by gradient": lambda _: {"allocation": "gradient", "weighting": "stability"},
    "AdapMTL, equal weights": lambda _: {},
    "AdapMTL, common threshold, equal weights": lambda _: {"allocation": "common"},
    "AdapMTL, code's weighting": lambda _: {"weighting": "deviation"},
}


#: Methods that end where they end, whatever sparsity is asked for.
UNAIMED = (DENSE, "AdapMTL, paper mode", "AdapMTL, paper mode, code's weighting")


def _with(**options: Any) -> Callable[[Problem], Options]:
    return lambda _: {"weighting": "stability", **options}


def _weighting(window: float, start: float) -> Callable[[Problem], Options]:
    """The default's weighting, with its window and start multiplied."""

    def make(problem: Problem) -> Options:
        tasks = list(problem.make_tasks())
        default = make_weighting("stability", tasks, problem.steps)
        assert isinstance(default, StabilityWeighting)
        return {
            "weighting": StabilityWeighting(
                tasks, window=round(window * default.window), start=round(start * default.start)
            )
        }

    return make


#: The library's defaults with one number changed.
SETTINGS: Mapping[str, Callable[[Problem], Options]] = {
    "window x 1/2": _weighting(0.5, 1),
    "window x 4": _weighting(4, 1),
    "weighting from the start": _weighting(1, 0),
    "weighting from half the run": _weighting(1, 2),
    "pruning from 0 %": _with(schedule=SparsitySchedule(start=0.0)),
    "pruning from 20 %": _with(schedule=SparsitySchedule(start=0.2)),
    "pruned by 35 %": _with(schedule=SparsitySchedule(end=0.35)),
    "pruned by 65 %": _with(schedule=SparsitySchedule(end=0.65)),
    "settled at 50 %": _with(schedule=SparsitySchedule(settled=0.5)),
    "settled at 90 %": VARIANTS[LATER],
    "rate 0.1": _with(allocation=LAMPAllocation(rate=0.1)),
    "rate 1": _with(allocation=LAMPAllocation(rate=1.0)),
    "strength 1": _with(allocation=LAMPAllocation(strength=1.0)),
    "by component": _with(granularity="component"),
    "reach 1.5": _with(reach=1.5),
    "reach inf": _with(reach=math.inf),
    "mask gradient": _with(gradient="mask"),
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **VARIANTS,
    **SETTINGS,
}
