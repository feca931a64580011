"""The harness of the published comparison: problems, methods, runs, studies, and tables.

It needs the extra `examples`, and the repository's root on the path. Its commands are
`python -m examples.benchmark`, which trains, and `python -m examples.benchmark.report`, which makes
tables and figures.
"""

from __future__ import annotations

from examples.benchmark.data import Data, Samples, Streamed
from examples.benchmark.figures import allocation_figure, tradeoff_figure
from examples.benchmark.lines import provenance, read
from examples.benchmark.methods import BASELINES, CANDIDATES, DENSE, METHODS, VARIANTS
from examples.benchmark.page import fill
from examples.benchmark.paper_scale import ENCODERS, paper_problem
from examples.benchmark.problem import Problem
from examples.benchmark.problems import CHOOSING, PROBLEMS, REPORTED, find_problem
from examples.benchmark.problems.tables import TEACHERS
from examples.benchmark.runs import evaluate, run, settings
from examples.benchmark.studies import STUDIES, study
from examples.benchmark.summary import Estimate, Margin, Row, differences, margin, summarize
from examples.benchmark.tables import (
    better_table,
    delta_table,
    difference_table,
    metric_tables,
    order_table,
    overview_table,
    paper_table,
    rank_table,
    suite_table,
    weighting_table,
)

__all__ = [
    "BASELINES",
    "CANDIDATES",
    "CHOOSING",
    "DENSE",
    "ENCODERS",
    "METHODS",
    "PROBLEMS",
    "REPORTED",
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
    "better_table",
    "delta_table",
    "difference_table",
    "differences",
    "evaluate",
    "fill",
    "find_problem",
    "margin",
    "metric_tables",
    "order_table",
    "overview_table",
    "paper_problem",
    "paper_table",
    "provenance",
    "rank_table",
    "read",
    "run",
    "settings",
    "study",
    "suite_table",
    "summarize",
    "tradeoff_figure",
    "weighting_table",
]
