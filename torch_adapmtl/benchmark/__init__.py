"""The harness behind the published comparison: problems, methods, runs, studies, and tables.

It needs the extra `examples`. `examples/benchmark.py` and `examples/report.py` are its command
lines.
"""

from __future__ import annotations

from .data import Data, Samples, Streamed
from .figures import allocation_figure, tradeoff_figure
from .methods import BASELINES, DENSE, METHODS, SETTINGS, VARIANTS
from .paper_scale import ENCODERS, paper_problem
from .problem import Problem
from .problems import COMPARISON, OTHERS, PROBLEMS, find_problem
from .runs import evaluate, run, settings
from .studies import STUDIES, read, study
from .summary import Estimate, Margin, Row, margin, summarize
from .synthetic import TEACHERS
from .tables import (
    delta_table,
    fill,
    margin_table,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    provenance,
)

__all__ = [
    "BASELINES",
    "COMPARISON",
    "DENSE",
    "ENCODERS",
    "METHODS",
    "OTHERS",
    "PROBLEMS",
    "SETTINGS",
    "STUDIES",
    "TEACHERS",
    "VARIANTS",
    "Data",
    "Estimate",
    "Margin",
    "Problem",
    "Row",
    "Samples",
    "Streamed",
    "allocation_figure",
    "delta_table",
    "evaluate",
    "fill",
    "find_problem",
    "margin",
    "margin_table",
    "metric_tables",
    "order_table",
    "overview_table",
    "paper_problem",
    "paper_table",
    "provenance",
    "read",
    "run",
    "settings",
    "study",
    "summarize",
    "tradeoff_figure",
]
