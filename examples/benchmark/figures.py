"""Figures of a study: trade-off curves, and where each method puts its zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from examples.benchmark.methods import OURS, PUBLISHED
from examples.benchmark.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["allocation_figure", "tradeoff_figure"]

_TICKS = (-200, -100, -50, -20, -10, -5, -2, 0, 2, 5)
_MARKERS = "osD^v<>"


def tradeoff_figure(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Delta_T over the sparsity, a panel for each problem, with standard errors.

    Args:
        rows: What `summarize` returned.
        methods: The methods to draw.
    """
    problems = _problems(rows)
    figure, axes = _panels(len(problems), height=3.4)
    sparsities = sorted({row.sparsity for row in rows if row.delta is not None})
    for axis, problem in zip(axes, problems, strict=True):
        for method in methods:
            points = sorted(
                (row for row in rows if (row.problem, row.method) == (problem, method)),
                key=lambda row: row.sparsity,
            )
            deltas = [row.delta for row in points if row.delta is not None]
            if not deltas:
                continue
            ours, published = method == OURS, method == PUBLISHED
            axis.errorbar(
                [_place(row.reached.mean) for row in points],
                [delta.mean for delta in deltas],
                [0.0 if delta.count == 1 else delta.error for delta in deltas],
                label=method,
                color=_color(method, methods),
                linewidth=2.2 if ours else 1.2,
                marker="*" if published else _MARKERS[methods.index(method) % len(_MARKERS)],
                markersize=11 if published else 4.5,
                zorder=4 if ours or published else 2,
                capsize=2,
            )
        axis.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axis.set_yscale("symlog", linthresh=5)
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xticks([_place(s) for s in sparsities], [f"{100 * s:g}" for s in sparsities])
        axis.set_xlabel("zeros, %")
        axis.set_title(problem)
        axis.set_ylabel(r"$\Delta_T$, %")
    _legend(figure, axes)
    return figure


def allocation_figure(rows: Sequence[Row], sparsity: float, methods: Sequence[str]) -> Figure:
    """The density of each component under each method, a panel for each problem.

    Args:
        rows: What `summarize` returned.
        sparsity: At which sparsity.
        methods: The methods to draw.
    """
    problems = _problems(rows)
    figure, axes = _panels(len(problems), height=3.0)
    for axis, problem in zip(axes, problems, strict=True):
        here = {
            row.method: row
            for row in rows
            if row.problem == problem and row.sparsity == sparsity and row.method in methods
        }
        names = list(dict.fromkeys(name for row in here.values() for name in row.components))
        width = 0.8 / max(len(methods), 1)
        for number, method in enumerate(methods):
            if method in here:
                axis.bar(
                    [c + (number - (len(methods) - 1) / 2) * width for c in range(len(names))],
                    [100 * (1 - here[method].components[name].mean) for name in names],
                    width,
                    label=method,
                    color=_color(method, methods),
                )
        axis.axhline(100 * (1 - sparsity), color="0.5", linewidth=0.8, linestyle="--", zorder=3)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=9)
        axis.set_title(problem)
        axis.set_ylabel("nonzero weights, %")
    _legend(figure, axes)
    return figure


def _problems(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.problem for row in rows))


def _color(method: str, methods: Sequence[str]) -> str:
    return "black" if method == OURS else f"C{methods.index(method)}"


def _place(sparsity: float) -> float:
    """Where a sparsity stands on the axis: by the logarithm of the density."""
    return -math.log(1 - sparsity)


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
