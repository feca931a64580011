"""The harness behind the published comparison: problems, methods, runs, and studies of many runs.

It needs the extra `examples`. `examples/benchmark.py` is its command line.
"""

from __future__ import annotations

from .methods import BASELINES, DENSE, METHODS, VARIANTS
from .problems import PROBLEMS, Problem, Samples
from .runs import evaluate, run, settings
from .studies import read, study

__all__ = [
    "BASELINES",
    "DENSE",
    "METHODS",
    "PROBLEMS",
    "VARIANTS",
    "Problem",
    "Samples",
    "evaluate",
    "read",
    "run",
    "settings",
    "study",
]
