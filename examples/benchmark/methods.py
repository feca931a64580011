"""The methods that are compared: what each passes to `apply_adapmtl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
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
    Method,
    Paper,
    RigL,
    SparsitySchedule,
    Taylor,
    TopKAST,
)

__all__ = [
    "BASELINES",
    "CANDIDATES",
    "DENSE",
    "METHODS",
    "PAIRS",
    "VARIANTS",
    "WEIGHTED",
]

Options = dict[str, Any]

#: The method that prunes nothing; what the others are compared with.
DENSE = "dense"

#: The library's default method, which is not the published algorithm.
OURS = "adaptive (ours)"

#: The same with a firm threshold, and without a scale.
FIRM = "adaptive, firm"

#: The same with the task weights of the paper.
STABLE = "adaptive, stability weights"

#: The same with a budget of multiply-adds.
MACS = "adaptive, macs"

#: The algorithm of the AdapMTL paper.
PUBLISHED = "AdapMTL as published"

_ONCE = SparsitySchedule(start=0.5, end=0.5)
# That of gradual baselines; it was the default before. LOG.md compares it with the default of now.
_GRADUAL = SparsitySchedule(start=0.05, end=0.5)


def _of(method: Method, weighting: str = "equal") -> Callable[[Problem], Options]:
    return lambda _: {"weighting": weighting, "method": method}


def _ours(weighting: str = "equal", **changed: Any) -> Callable[[Problem], Options]:
    """The library's defaults, but for what is given."""
    return _of(Adaptive(**changed), weighting)


#: Methods of others, with equal task weights.
BASELINES: Mapping[str, Callable[[Problem], Options]] = {
    "uniform magnitude": _of(Magnitude("uniform", schedule=_GRADUAL)),
    "global magnitude": _of(Magnitude(schedule=_GRADUAL)),
    "one-shot": _of(Magnitude(schedule=_ONCE)),
    "IMP": _of(IterativeMagnitude()),
    "LTH": _of(IterativeMagnitude(rounds=1, rewind=True)),
    "SNIP": _of(SNIP()),
    "DiSparse": _of(DiSparse()),
    "DiSparse dynamic": _of(DiSparse(dynamic=True)),
    "Taylor": _of(Taylor(schedule=_GRADUAL)),
    # These train sparse.
    "RigL": _of(RigL()),
    "AC/DC": _of(ACDC()),
    "GraNet": _of(GraNet()),
    "Top-KAST": _of(TopKAST()),
    # These shrink the remaining weights.
    "ST-3": _of(ST3()),
    "Feather": _of(Feather()),
    # The pair was found for the paper's thresholds, which rise in the same way.
    "STR": lambda problem: {
        "method": STR(problem.paper.start, problem.paper.weight_decay),
        "weighting": "equal",
    },
}


def _weighted(make: Callable[[Problem], Options]) -> Callable[[Problem], Options]:
    return lambda problem: {**make(problem), "weighting": "stability"}


#: The same with the task weights of the paper.
WEIGHTED: Mapping[str, Callable[[Problem], Options]] = {
    f"{name}, stability weights": _weighted(make) for name, make in BASELINES.items()
}

#: The default method, the published algorithm, and the default with one part changed.
VARIANTS: Mapping[str, Callable[[Problem], Options]] = {
    OURS: _ours(),
    PUBLISHED: lambda problem: {"method": problem.paper, "weighting": "stability"},
    FIRM: _ours(reach=1.1),
    "adaptive, soft": _ours(reach=math.inf),
    "adaptive, common threshold": _ours(allocation="common"),
    "adaptive, by sensitivity": _ours(allocation="sensitivity"),
    "adaptive, by gradient": _ours(allocation="gradient"),
    "adaptive, by component": _ours(granularity="component"),
    "adaptive, masked gradient": _ours(gradient="mask"),
    "adaptive, fixed at 50 %": _ours(schedule=SparsitySchedule(fix_at=0.5)),
    STABLE: _ours("stability"),
    "adaptive, code's weighting": _ours("deviation"),
    MACS: lambda problem: {**_ours()(problem), "count": "macs"},
}


#: The published algorithm with the pairs of start and decay that were tried, alike on all problems.
PAIRS: Mapping[str, Callable[[Problem], Options]] = {
    f"{PUBLISHED}, start {start:g}, decay {decay:g}": _of(Paper(start, decay), "stability")
    for start in (-6.0, -5.0)
    for decay in (0.1, 1.0)
}


#: Candidates for the default method.
CANDIDATES: Mapping[str, Callable[[Problem], Options]] = {
    # With equal task weights.
    "norm of the layer": _of(Shaped(shape="soft, norm of the layer, doubled at most")),
    "pruned by 20 %": _ours(schedule=SparsitySchedule(end=0.2)),
    "pruned by 35 %": _ours(schedule=SparsitySchedule(end=0.35)),
    "pruned from 5 to 35 %": _ours(schedule=SparsitySchedule(start=0.05, end=0.35)),
    "pruned from 5 to 50 %": _ours(schedule=_GRADUAL),
    "pruned from 0 to 50 %": _ours(schedule=SparsitySchedule(end=0.5)),
    "pruned from 5 to 70 %": _ours(schedule=SparsitySchedule(start=0.05, end=0.7)),
    "Taylor, pruned from 0 to 50 %": _of(Taylor(schedule=SparsitySchedule(end=0.5))),
    "Taylor, pruned by 35 %": _of(Taylor(schedule=SparsitySchedule(end=0.35))),
    "strength 0.5": _ours(allocation=LAMPAllocation(strength=0.5)),
    # With the stability weighting, which was the default before.
    "firm": _ours("stability", reach=1.1),
    "strength 1": _ours("stability", allocation=LAMPAllocation(strength=1.0)),
    "pruned by 65 %": _ours("stability", schedule=SparsitySchedule(start=0.05, end=0.65)),
    "regrow until 90 %": _ours("stability", schedule=replace(_GRADUAL, regrow_until=0.9)),
    **{shape: _of(Shaped(shape=shape), "stability") for shape in SHAPES},
    "soft, magnitude of the layer, at updates": _of(
        Shaped(shape="soft, magnitude of the layer", renewed="updates"), "stability"
    ),
}

#: Every method by name; each makes the options of `apply_adapmtl`, `weighting="equal"` unless said.
METHODS: Mapping[str, Callable[[Problem], Options]] = {
    DENSE: lambda _: {},
    **BASELINES,
    **WEIGHTED,
    **VARIANTS,
    **PAIRS,
    **CANDIDATES,
}
