"""Pictures of a run and of a model; needs matplotlib (the extra `plots`).

Each function returns a `matplotlib.figure.Figure`: save it by `figure.savefig(path, dpi=200)`. The
figures are 7 inches wide, so that their text can be read at the width of a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isnan
from statistics import fmean
from typing import Any

from torch_adapmtl.run.history import History
from torch_adapmtl.run.report import Report

try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )
except ImportError as error:
    raise ImportError(
        'torch_adapmtl.plots needs matplotlib; install it with pip install "torch-adapmtl[plots]"'
    ) from error

__all__ = ["plot_allocation", "plot_sparsity", "plot_task_weights", "plot_tradeoff"]

_WIDTH = 7.0  # inches
_FONT = 9  # points
# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BLACK, _GREY = "#24292f", "#8c959f"
# Each time the colours begin again, the lines are drawn in another way.
_STYLES = ("solid", (0, (4, 1.5)), (0, (1, 1)))
_ABREAST = 4  # small panels in a row


def plot_sparsity(history: History) -> Figure:
    """Draw the sparsity and the thresholds of each component over the run.

    The thresholds of each component have a panel, with a logarithmic axis: a band from the smallest
    to the largest of its layers. They are left out where they are zero, and if the method has none.

    Args:
        history: The history of a run, `pruner.history`.

    Returns:
        The figure.

    Raises:
        ValueError: If the history has no rows.

    Example:
        >>> from torch_adapmtl import History
        >>> from torch_adapmtl.plots import plot_sparsity
        >>> history = History(
        ...     steps=[10, 20],
        ...     sparsity={"shared": [0.2, 0.9], "overall": [0.2, 0.9]},
        ...     pruned=[0.2, 0.9],
        ...     thresholds={"shared": [(0.01, 0.02), (0.03, 0.05)]},
        ...     task_weights={"seg": [1.0, 1.0]},
        ...     losses={"seg": [2.0, 1.0]},
        ...     target_sparsity=0.9,
        ... )
        >>> [axes.get_ylabel() for axes in plot_sparsity(history).axes]
        ['zero weights (%)', 'threshold']
    """
    _check(history)
    styles, steps = _styles(history), history.steps
    bands = {
        name: shown
        for name, pairs in history.thresholds.items()
        if (shown := [(step, *pair) for step, pair in zip(steps, pairs, strict=True) if pair[0]])
    }
    columns = min(len(bands), _ABREAST) or 1
    below = -(-len(bands) // columns)
    figure = _figure(3.2 + 1.7 * below)
    grid = figure.add_gridspec(1 + below, columns, height_ratios=[2.4, *[1.3] * below])
    axis = _plain(figure.add_subplot(grid[0, :]))
    lines = {**history.sparsity}
    if history.count == "macs":
        lines["multiply-adds"] = history.pruned
    ends = {}
    for name, values in lines.items():
        percent = [100 * value for value in values]
        width = 2.6 if name in ("overall", "multiply-adds") else 1.6
        axis.plot(steps, percent, lw=width, marker=_marker(history), **styles[name])
        ends[f"{_short(name, 24)}  {percent[-1]:.1f} %"] = percent[-1], styles[name]["color"]
    target = 100 * history.target_sparsity
    axis.axhline(target, color=_GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    share = "" if history.count == "weights" else " of the multiply-adds"
    axis.annotate(
        f"target {target:g} %{share}", (0, target), (4, 3), color=_GREY, fontsize=_FONT - 1,
        xycoords=("axes fraction", "data"), textcoords="offset points",
    )  # fmt: skip
    axis.set(xlabel="step", ylabel="zero weights (%)", ylim=(0, 104))
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))

    first: Axes | None = None
    for index, (name, band) in enumerate(bands.items()):
        place = grid[1 + index // columns, index % columns]
        panel = _plain(figure.add_subplot(place, sharey=first))
        panel.set_xlim(axis.get_xlim())
        panel.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        at, low, high = zip(*band, strict=True)
        panel.fill_between(at, low, high, color=styles[name]["color"], alpha=0.25, lw=0)
        for edge in (low, high):
            panel.plot(at, edge, lw=1.2, color=styles[name]["color"])
        panel.set_title(_short(name, 20), fontsize=_FONT, color=styles[name]["color"])
        panel.tick_params(labelleft=index % columns == 0)
        if first is None:
            first = panel
            panel.set_ylabel("threshold")
    if first is not None:
        every = [value for band in bands.values() for row in band for value in row[1:]]
        first.set_yscale("log")
        _log_ticks(first.yaxis, every)
    _label_ends(axis, ends)
    return figure


def plot_task_weights(history: History) -> Figure:
    """Draw the weight and the loss of each task over the run.

    A thin line has the losses as they were recorded, a thick one their mean over a twentieth of the
    rows. The axis of the losses is logarithmic if all of them are positive.

    Args:
        history: The history of a run, `pruner.history`.

    Returns:
        The figure.

    Raises:
        ValueError: If the history has no rows.

    Example:
        >>> from torch_adapmtl import History
        >>> from torch_adapmtl.plots import plot_task_weights
        >>> history = History(
        ...     steps=[10, 20, 30],
        ...     sparsity={"overall": [0.1, 0.2, 0.3]},
        ...     pruned=[0.1, 0.2, 0.3],
        ...     thresholds={},
        ...     task_weights={"seg": [1.0, 0.9, 0.8], "depth": [1.0, 1.1, 1.2]},
        ...     losses={"seg": [2.0, 1.5, 1.0], "depth": [0.5, None, 0.1]},
        ...     target_sparsity=0.9,
        ... )
        >>> [axes.get_ylabel() for axes in plot_task_weights(history).axes]
        ['task weight', 'loss']
    """
    _check(history)
    styles, figure = _styles(history), _figure(5.2)
    above, below = map(_plain, figure.subplots(2, 1, sharex=True))
    ends = {}
    for task, weights in history.task_weights.items():
        above.plot(history.steps, weights, lw=1.6, marker=_marker(history), **styles[task])
        ends[f"{_short(task, 24)}  {weights[-1]:.2f}"] = weights[-1], styles[task]["color"]
    above.axhline(1, color=_GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    above.set(ylabel="task weight")
    above.set_ylim(bottom=0)
    _label_ends(above, ends)

    ends, reach = {}, max(len(history) // 40, 1)
    known = [loss for losses in history.losses.values() for loss in losses if loss is not None]
    below.set(xlabel="step", ylabel="loss")
    below.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if known and min(known) > 0:
        below.set_yscale("log")
        _log_ticks(below.yaxis, known)
    for task, losses in history.losses.items():
        shown = [
            (step, loss)
            for step, loss in zip(history.steps, losses, strict=True)
            if loss is not None
        ]
        if not shown:
            continue
        at, values = zip(*shown, strict=True)
        smooth = [fmean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))]
        below.plot(at, values, lw=0.7, alpha=0.35, color=styles[task]["color"])
        below.plot(at, smooth, lw=1.6, marker=_marker(history), **styles[task])
        ends[f"{_short(task, 24)}  {smooth[-1]:.3g}"] = smooth[-1], styles[task]["color"]
    _label_ends(below, ends)
    return figure


def plot_allocation(report: Report) -> Figure:
    """Draw how many weights of each layer are left, of how many, by component.

    Both numbers are on a logarithmic axis. The figure grows with the number of layers.

    Args:
        report: A report, `pruner.report()`.

    Returns:
        The figure.

    Raises:
        ValueError: If the report has no layers.

    Example:
        >>> from torch_adapmtl import ComponentRow, LayerRow, Report
        >>> from torch_adapmtl.plots import plot_allocation
        >>> report = Report(
        ...     components=(ComponentRow("shared", 2, 600, 480),),
        ...     layers=(
        ...         LayerRow("body.0.weight", "shared", (20, 15), 200, 0.01),
        ...         LayerRow("body.1.weight", "shared", (20, 15), 280, 0.03),
        ...     ),
        ...     target_sparsity=0.8,
        ...     step=100,
        ...     total_steps=100,
        ... )
        >>> [
        ...     label.get_text()
        ...     for label in plot_allocation(report).axes[0].get_yticklabels()
        ... ]
        ['shared', 'body.0', 'body.1']
    """
    if not report.layers:
        raise ValueError("report has no layers to draw: make it by pruner.report()")
    order = {row.name: index for index, row in enumerate(report.components)}
    layers = sorted(report.layers, key=lambda row: order[row.component])
    colors = dict(zip(order, _cycle(len(order)), strict=True))
    height = 0.9 + 0.172 * (len(layers) + 1.5 * len(order))
    figure = _figure(height)
    axis = figure.subplots()
    left: float = min(row.weights - row.zeros or row.weights for row in layers)
    if any(row.weights == row.zeros for row in layers):
        left /= 3  # where a layer without weights is drawn
    ticks: list[tuple[float, str, str | None]] = []
    y = 0.0
    for component, rows in groupby(layers, key=lambda row: row.component):
        color: str = colors[component]["color"]
        members = list(rows)
        total = sum(row.weights for row in members)
        remaining = total - sum(row.zeros for row in members)
        ticks.append((y, _short(component, 26), color))
        _note(axis, y, remaining, total, color=color, weight="bold")
        for row in members:
            y += 1
            kept = row.weights - row.zeros
            axis.plot([max(kept, left), row.weights], [y, y], color=color, lw=1.2, alpha=0.45)
            axis.plot(row.weights, y, "o", ms=4.5, mfc="white", mec=color, mew=1)
            axis.plot(max(kept, left), y, "o" if kept else "x", ms=4.5, color=color)
            ticks.append((y, _short(row.name.removesuffix(".weight")), None))
            _note(axis, y, kept, row.weights, color=_BLACK)
        y += 1.5
    most = max(row.weights for row in layers)
    axis.set(xscale="log", xlim=(left / 1.5, 1.5 * most), ylim=(y - 0.5, -1))
    axis.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks], fontsize=_FONT - 1.5)
    for label, (_, _, header) in zip(axis.get_yticklabels(), ticks, strict=True):
        if header:
            label.set(color=header, weight="bold", fontsize=_FONT)
    axis.set_xlabel("weights: ● left, ○ all", fontsize=_FONT)
    _log_ticks(axis.xaxis, [left, most])
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=_FONT - 1)
    axis.grid(axis="x", color="#d0d7de", lw=0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def plot_tradeoff(
    rows: Iterable[Mapping[str, Any]],
    *,
    x: Mapping[str, str],
    y: Mapping[str, str],
    name: str = "name",
    group: str = "group",
) -> Figure:
    """Draw measured models as named points: one panel for each of the quantities in `x`.

    Args:
        rows: A mapping for each model, such as
            `{"name": "90 %", "group": "pruned", "accuracy": 93.1, "ms": 1.8, "mb": 0.9}`. A model
            is left out of a panel whose number it does not have, and everywhere if it has no number
            of `y`.
        x: The keys of the numbers on the horizontal axes, and what the axes say: of sizes and
            times, which are positive. The axes are logarithmic.
        y: The key of the number on the vertical axis, and what the axis says.
        name: The key of the name of a point.
        group: The key of the group of a point. The points of a group are joined; rows without one
            form one group.

    Returns:
        The figure.

    Raises:
        TypeError: If `x` or `y` is no mapping, or a number is none.
        ValueError: If there are no rows, `x` is empty, `y` has not exactly one key, or no row has a
            number of a key; if a number of `x` is not positive.

    Example:
        >>> from torch_adapmtl.plots import plot_tradeoff
        >>> rows = [
        ...     {
        ...         "name": "dense",
        ...         "group": "dense",
        ...         "accuracy": 93.0,
        ...         "ms": 2.3,
        ...         "mb": 11.2,
        ...     },
        ...     {
        ...         "name": "90 %",
        ...         "group": "pruned",
        ...         "accuracy": 92.8,
        ...         "ms": 1.2,
        ...         "mb": 1.9,
        ...     },
        ...     {
        ...         "name": "95 %",
        ...         "group": "pruned",
        ...         "accuracy": 92.1,
        ...         "ms": 1.0,
        ...         "mb": 1.1,
        ...     },
        ... ]
        >>> x = {"ms": "latency (ms)", "mb": "file (MB)"}
        >>> figure = plot_tradeoff(rows, x=x, y={"accuracy": "accuracy (%)"})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['latency (ms)', 'file (MB)']
    """
    rows = list(rows)
    for argument, keys in (("x", x), ("y", y)):
        if not isinstance(keys, Mapping):
            raise TypeError(
                f"{argument} must be a mapping from a key to what its axis says, such as "
                f'{{"ms": "latency (ms)"}}, found {keys!r}'
            )
    if not rows or not x or len(y) != 1:
        raise ValueError(
            f"rows, x and y must hold at least one model, at least one key and exactly one key, "
            f"got {len(rows)}, {list(x)} and {list(y)}"
        )
    ((key, says),) = y.items()
    rows = [row for row in rows if _number(row, key) is not None]
    for number in x:
        found = [value for row in rows if (value := _number(row, number)) is not None]
        if not found or min(found) <= 0:
            raise ValueError(
                f"rows must have {key!r} and positive numbers of {number!r}, found {found} among "
                f"those with {key!r}"
            )
    groups = list(dict.fromkeys(row.get(group, "") for row in rows))
    styles = dict(zip(groups, _cycle(len(groups)), strict=True))
    figure = _figure(3.9)
    panels = figure.subplots(1, len(x), sharey=True, squeeze=False)[0]
    for axis, (number, label) in zip(panels, x.items(), strict=True):
        axis.set(xscale="log", xlabel=label)
        every = [value for row in rows if (value := _number(row, number)) is not None]
        for member in groups:
            points = sorted(
                (row[number], row[key], _short(str(row.get(name, ""))))
                for row in rows
                if row.get(group, "") == member and _number(row, number) is not None
            )
            at, values = [point[0] for point in points], [point[1] for point in points]
            axis.plot(
                at, values, "o", ms=5, lw=1.2, **{**styles[member], "label": _short(str(member))}
            )
            # On the free sides of a rising line. The first group is labelled below, the others in
            # turn above and below.
            side = 1 if groups.index(member) % 2 else -1
            for point in points:
                axis.annotate(
                    point[2], point[:2], (-3 * side, 4 * side), textcoords="offset points",
                    ha="right" if side > 0 else "left", va="bottom" if side > 0 else "top",
                    fontsize=_FONT - 1, color=styles[member]["color"],
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )  # fmt: skip
        axis.margins(0.2, 0.12)
        _plain(axis)
        _log_ticks(axis.xaxis, every)
    panels[0].set_ylabel(says, fontsize=_FONT)
    if groups != [""]:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=_FONT
        )
    return figure


# --- what they share ------------------------------------------------------------------------------


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, str) or isnan(number := float(value)):
        raise TypeError(
            f"rows must hold numbers or None, found {value!r} as {key!r} of {dict(row)}"
        )
    return number


def _check(history: History) -> None:
    if not len(history):
        raise ValueError("history has no rows to draw yet: call pruner.step() in the training loop")


def _marker(history: History) -> str | None:
    """A single row is no line."""
    return "o" if len(history) == 1 else None


def _cycle(count: int) -> list[dict[str, Any]]:
    """Colours and line styles that differ."""
    shades = len(_COLORS)
    return [
        {"color": _COLORS[i % shades], "ls": _STYLES[i // shades % len(_STYLES)]}
        for i in range(count)
    ]


def _styles(history: History) -> dict[str, dict[str, Any]]:
    """The same for a task and the component of that name, in all pictures of a history."""
    names = [name for name in (*history.sparsity, *history.task_weights) if name != "overall"]
    names = list(dict.fromkeys(names))
    styles = dict(zip(names, _cycle(len(names)), strict=True))
    macs = {"color": _BLACK, "ls": _STYLES[2]}
    return {**styles, "overall": {"color": _BLACK, "ls": "solid"}, "multiply-adds": macs}


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _plain(axis: Axes) -> Axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=_FONT - 1)
    axis.xaxis.label.set_fontsize(_FONT)
    axis.yaxis.label.set_fontsize(_FONT)
    axis.grid(axis="y", color="#d0d7de", lw=0.5)
    return axis


def _log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Label powers of ten, and numbers between them if there are few."""
    few = max(values) < 200 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axis.set_minor_formatter(NullFormatter())


def _label_ends(axis: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write labels to the right of the ends of lines, moved apart where they would overlap."""
    if not ends:
        return
    figure = axis.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # sets the limits and the size of the panel
    low, high = axis.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    order = sorted(ends, key=lambda label: ends[label][0])
    to_axes = axis.transData.transform([(0, ends[label][0]) for label in order])[:, 1]
    places = _apart(
        [(y - low) / (high - low) for y in to_axes], 1.25 * _FONT / 72 * figure.dpi / (high - low)
    )
    for label, place in zip(order, places, strict=True):
        axis.annotate(
            label, (1, place), (5, 0), xycoords="axes fraction", textcoords="offset points",
            color=ends[label][1], fontsize=_FONT, va="center",
        )  # fmt: skip


def _apart(wanted: Sequence[float], distance: float) -> list[float]:
    """The places nearest to the wanted ones, in order, that are so far apart."""
    # Blocks of labels that touch, each centred on the mean of its wanted places.
    blocks: list[list[float]] = []
    for place in wanted:
        blocks.append([place])
        while len(blocks) > 1:
            lower, upper = blocks[-2:]
            need = distance * (len(lower) + len(upper)) / 2
            if fmean(upper) - fmean(lower) >= need:
                break
            blocks[-2:] = [lower + upper]
    return [
        fmean(block) + distance * (i - (len(block) - 1) / 2)
        for block in blocks
        for i in range(len(block))
    ]


def _note(axis: Axes, y: float, left: int, total: int, **style: Any) -> None:
    """Write at the right of a line how many weights are left."""
    share = 100 * left / total
    percent = f"{share:.1f} %" if share >= 0.1 or not left else f"{share:.1g} %"
    texts = ((46, "right", percent), (56, "left", f"{_count(left)} of {_count(total)}"))
    for offset, side, text in texts:
        axis.annotate(
            text, (1, y), (offset, 0), xycoords=("axes fraction", "data"), va="center", ha=side,
            textcoords="offset points", fontsize=_FONT - 1.5, **style,
        )  # fmt: skip


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.4g}"


def _short(name: str, most: int = 34) -> str:
    """A name as it is, without what matplotlib would take for mathematics; a long one's ends."""
    half = (most - 1) // 2
    short = name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"
    return short.replace("$", r"\$")
