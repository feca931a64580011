"""The methods that are compared: what each passes to `apply_adapmtl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch_adapmtl.baselines import SNIP, DiSparse, IterativeMagnitude, Magnitude, Taylor
from torch_adapmtl.benchmark.problems import Problem
from torch_adapmtl.budget import SparsitySchedule
from torch_adapmtl.paper import PaperMode

__all__ = ["BASELINES", "DENSE", "METHODS", "VARIANTS"]

Options = dict[str, Any]

#: The method that prunes nothing; what the others are compared with.
DENSE = "dense"

_ONCE = SparsitySchedule(start=0.5, end=0.5)

#: Methods of others, with equal task weights, as in their papers.
BASELINES: Mapping[str, Callable[[Problem], Options]] = {
    "uniform magnitude": lambda _: {"mode": Magnitude("uniform")},
    "global magnitude": lambda _: {"mode": Magnitude()},
    "one-shot": lambda _: {"mode": Magnitude(schedule=_ONCE)},
    "IMP": lambda _: {"mode": IterativeMagnitude()},
    "LTH": lambda _: {"mode": IterativeMagnitude(rewind=True)},
    "SNIP": lambda _: {"mode": SNIP()},
    "DiSparse": lambda _: {"mode": DiSparse()},
    "DiSparse dynamic": lambda _: {"mode": DiSparse(dynamic=True)},
    "Taylor": lambda _: {"mode": Taylor()},
}

#: AdapMTL with the library's defaults, and with one part of it changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    "AdapMTL": lambda _: {"weighting": "stability"},
    "AdapMTL, paper mode": lambda problem: {
        "mode": PaperMode(start=problem.paper_start),
        "weighting": "stability",
    },
    "AdapMTL, paper mode, code's weighting": lambda problem: {
        "mode": PaperMode(start=problem.paper_start),
        "weighting": "deviation",
    },
    "AdapMTL, common threshold": lambda _: {"allocation": "common", "weighting": "stability"},
    "AdapMTL, by component": lambda _: {"granularity": "component", "weighting": "stability"},
    "AdapMTL, by gradient": lambda _: {"allocation": "gradient", "weighting": "stability"},
    "AdapMTL, equal weights": lambda _: {},
    "AdapMTL, code's weighting": lambda _: {"weighting": "deviation"},
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **VARIANTS,
}
