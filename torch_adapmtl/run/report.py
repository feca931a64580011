"""The report of a run: the sparsity of each part, as a table for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import prod
from typing import Any, Literal, NamedTuple

from torch_adapmtl._tables import details, html_table, text_table

__all__ = ["ComponentRow", "DensePart", "LayerRow", "Report", "total_macs"]


@dataclass(frozen=True)
class ComponentRow:
    """The sparsity of one component.

    Attributes:
        name: The component: `shared`, a task, or tasks joined by `+`.
        tensors: Number of prunable tensors in it.
        weights: Number of prunable weights in it.
        zeros: Number of those that are zero.
        macs: Multiply-adds of its weights for one example; None if they are not known.
        macs_left: Multiply-adds of those that are not zero.
    """

    name: str
    tensors: int
    weights: int
    zeros: int
    macs: float | None = None
    macs_left: float | None = None

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the component's prunable weights."""
        return _fraction(self.zeros, self.weights)


@dataclass(frozen=True)
class LayerRow:
    """The sparsity of one prunable tensor.

    Attributes:
        name: The tensor's qualified name in the model.
        component: The component it belongs to.
        shape: Its shape.
        zeros: Number of its weights that are zero.
        threshold: The magnitude up to which its weights are zero.
        positions: Number of multiply-adds that each of its weights takes part in, for one example;
            None if it is not known.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    zeros: int
    threshold: float
    positions: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights in the tensor."""
        return prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the tensor's weights."""
        return _fraction(self.zeros, self.weights)

    @property
    def macs(self) -> float | None:
        """Multiply-adds of all its weights for one example; None if they are not known."""
        return None if self.positions is None else self.positions * self.weights

    @property
    def macs_left(self) -> float | None:
        """Multiply-adds of its nonzero weights for one example; None if they are not known."""
        return None if self.positions is None else self.positions * (self.weights - self.zeros)


class DensePart(NamedTuple):
    """A tensor that stays dense and is not counted in any sparsity.

    Attributes:
        name: The tensor's qualified name in the model.
        reason: Why it stays dense, for example `unused` or `frozen`.
        weights: Number of its weights.
    """

    name: str
    reason: str
    weights: int


@dataclass(frozen=True)
class Report:
    """The sparsity of a model at one step of its training.

    A report prints as a table of components; in a notebook it also shows the layers. Sparsity is
    the number of zeros divided by the number of prunable weights, as a fraction in the attributes
    and in percent in the tables. Multiply-adds are those of the prunable weights, for one example.

    Attributes:
        components: One row per component.
        layers: One row per prunable tensor.
        target_sparsity: What is to be pruned at the end, as a fraction of what `count` says.
        step: Number of steps taken.
        total_steps: Number of steps of the run.
        dense: The tensors that stay dense; tuples of name, reason and weights are accepted.
        task_weights: The present weight of each task's loss.
        losses: The last loss of each task that has had one, without its weight.
        given: How many zeros were fixed when the run began.
        count: What the target counts: `"weights"` or `"macs"`.
        has_thresholds: Whether thresholds prune weights; methods that prune by masks have none.

    Example:
        >>> print(
        ...     Report(
        ...         components=(
        ...             ComponentRow("shared", 2, 600, 480, 5400.0, 1480.0),
        ...             ComponentRow("seg", 1, 400, 400, 400.0, 0.0),
        ...         ),
        ...         layers=(
        ...             LayerRow("body.0.weight", "shared", (20, 15), 200, 0.01, 14.0),
        ...             LayerRow("body.1.weight", "shared", (20, 15), 280, 0.03, 4.0),
        ...             LayerRow("seg.weight", "seg", (20, 20), 400, 0.02, 1.0),
        ...         ),
        ...         target_sparsity=0.9,
        ...         step=70,
        ...         total_steps=100,
        ...         dense=[("aux.weight", "unused", 1200)],
        ...         task_weights={"seg": 1.0},
        ...     )
        ... )
        component  tensors  weights  zeros  sparsity  MACs left      threshold
        shared           2      600    480   80.00 %    27.41 %  0.01 ... 0.03
        seg              1      400    400  100.00 %     0.00 %           0.02
        overall          3    1,000    880   88.00 %    25.52 %
        target 90.00 %, step 70 of 100
        task weights: seg 1.00
        left dense, not counted: 1,200 weights
          aux.weight  unused  1,200
    """

    components: tuple[ComponentRow, ...]
    layers: tuple[LayerRow, ...]
    target_sparsity: float
    step: int
    total_steps: int
    dense: Sequence[tuple[str, str, int]] = ()
    task_weights: Mapping[str, float] = field(default_factory=dict)
    given: int = 0
    count: Literal["weights", "macs"] = "weights"
    losses: Mapping[str, float] = field(default_factory=dict)
    has_thresholds: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", tuple(self.components))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "dense", tuple(DensePart(*part) for part in self.dense))
        object.__setattr__(self, "task_weights", dict(self.task_weights))
        object.__setattr__(self, "losses", dict(self.losses))

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(row.weights for row in self.components)

    @property
    def zeros(self) -> int:
        """Number of prunable weights that are zero."""
        return sum(row.zeros for row in self.components)

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of all prunable weights."""
        return _fraction(self.zeros, self.weights)

    @property
    def macs(self) -> float | None:
        """Multiply-adds of the prunable weights for one example; None if they are not known."""
        return total_macs(row.macs for row in self.components)

    @property
    def macs_left(self) -> float | None:
        """Multiply-adds of the nonzero weights for one example; None if they are not known."""
        return total_macs(row.macs_left for row in self.components)

    @property
    def pruned(self) -> float:
        """What is pruned as a fraction of what the target counts: weights, or multiply-adds."""
        if self.count == "weights" or self.macs is None or self.macs_left is None:
            return self.sparsity
        return 1.0 - _share(self.macs_left, self.macs)

    def thresholds(self, component: str) -> tuple[float, float] | None:
        """Return the smallest and largest threshold of a component; None if it has no layer."""
        thresholds = [row.threshold for row in self.layers if row.component == component]
        return (min(thresholds), max(thresholds)) if thresholds else None

    def scalars(self) -> dict[str, float]:
        """Return numbers to log, by name: sparsities, thresholds, task weights and losses.

        Sparsities are fractions. With a target in multiply-adds, `macs_pruned` is the share of them
        that is saved. Of the thresholds of a component there are the smallest and the largest. To
        log them to TensorBoard:
        `for name, value in pruner.report().scalars().items(): writer.add_scalar(name, value, step)`

        Example:
            >>> from torch_adapmtl.run import ComponentRow, Report
            >>> parts = (
            ...     ComponentRow("shared", 2, 600, 480),
            ...     ComponentRow("seg", 1, 400, 400),
            ... )
            >>> Report(parts, (), target_sparsity=0.9, step=7, total_steps=9).scalars()
            {'sparsity/shared': 0.8, 'sparsity/seg': 1.0, 'sparsity/overall': 0.88}
        """
        thresholds = {
            row.name: pair
            for row in self.components
            if self.has_thresholds and (pair := self.thresholds(row.name)) is not None
        }
        return {
            **{f"sparsity/{row.name}": row.sparsity for row in self.components},
            "sparsity/overall": self.sparsity,
            **({} if self.count == "weights" else {"macs_pruned": self.pruned}),
            **{f"threshold_min/{name}": pair[0] for name, pair in thresholds.items()},
            **{f"threshold_max/{name}": pair[1] for name, pair in thresholds.items()},
            **{f"task_weight/{task}": weight for task, weight in self.task_weights.items()},
            **{f"loss/{task}": loss for task, loss in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, which JSON can hold."""
        return {
            "target_sparsity": self.target_sparsity,
            "count": self.count,
            "sparsity": self.sparsity,
            "weights": self.weights,
            "zeros": self.zeros,
            "macs": self.macs,
            "macs_left": self.macs_left,
            "given": self.given,
            "step": self.step,
            "total_steps": self.total_steps,
            "task_weights": dict(self.task_weights),
            "losses": dict(self.losses),
            "components": [
                {
                    "name": row.name,
                    "tensors": row.tensors,
                    "weights": row.weights,
                    "zeros": row.zeros,
                    "sparsity": row.sparsity,
                    "macs": row.macs,
                    "macs_left": row.macs_left,
                    "thresholds": list(self.thresholds(row.name) or ()),
                }
                for row in self.components
            ],
            "layers": [
                {
                    "name": row.name,
                    "component": row.component,
                    "shape": list(row.shape),
                    "weights": row.weights,
                    "zeros": row.zeros,
                    "sparsity": row.sparsity,
                    "threshold": row.threshold,
                    "positions": row.positions,
                }
                for row in self.layers
            ],
            "dense": [DensePart(*part)._asdict() for part in self.dense],
        }

    def __str__(self) -> str:
        lines = [*text_table(self._component_table(), left=1), self._progress()]
        if self.given:
            lines.append(self._given_line())
        if self.task_weights:
            lines.append(self._weights_line())
        if self.dense:
            lines.append(self._dense_line())
            parts = [[name, reason, f"{count:,}"] for name, reason, count in self.dense]
            lines += [f"  {line}" for line in text_table(parts, left=2)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        blocks = [html_table(self._component_table(), left=1, caption=self._progress())]
        if self.task_weights:
            blocks.append(f"<p>{escape(self._weights_line())}</p>")
        if self.given:
            blocks.append(f"<p>{escape(self._given_line())}</p>")
        if self.layers:
            rows = [["layer", "component", "shape", "weights", "zeros", "sparsity", "threshold"]]
            rows[0] += ["positions"] * (self.macs is not None)
            for row in self.layers:
                shape = " x ".join(map(str, row.shape))
                counts = [f"{row.weights:,}", f"{row.zeros:,}", _percent(row.sparsity)]
                positions = [] if self.macs is None else [f"{row.positions:,.6g}"]
                alpha = f"{row.threshold:.3g}"
                rows.append([row.name, row.component, shape, *counts, alpha, *positions])
            blocks.append(details(f"{len(self.layers)} layers", html_table(rows, left=3)))
        if self.dense:
            rows = [["tensor", "reason", "weights"]]
            rows += [[name, reason, f"{count:,}"] for name, reason, count in self.dense]
            blocks.append(details(self._dense_line(), html_table(rows, left=2)))
        return "<div>" + "".join(blocks) + "</div>"

    def _component_table(self) -> list[list[str]]:
        known = ["MACs left"] * (self.macs is not None)
        rows = [["component", "tensors", "weights", "zeros", "sparsity", *known, "threshold"]]
        overall = ComponentRow(
            "overall",
            sum(row.tensors for row in self.components),
            self.weights,
            self.zeros,
            self.macs,
            self.macs_left,
        )
        for row in (*self.components, overall):
            thresholds = dict.fromkeys(f"{x:.3g}" for x in self.thresholds(row.name) or ())
            counts = [f"{row.tensors:,}", f"{row.weights:,}", f"{row.zeros:,}"]
            left = [_percent(_share(row.macs_left, row.macs))] * len(known)
            rows.append(
                [row.name, *counts, _percent(row.sparsity), *left, " ... ".join(thresholds)]
            )
        return rows

    def _progress(self) -> str:
        target = _percent(self.target_sparsity)
        if self.count == "macs":
            target += " of the multiply-adds"
        return f"target {target}, step {self.step:,} of {self.total_steps:,}"

    def _weights_line(self) -> str:
        weights = (f"{task} {weight:.2f}" for task, weight in self.task_weights.items())
        return f"task weights: {', '.join(weights)}"

    def _given_line(self) -> str:
        return f"weights that were zero before the run, and are kept so: {self.given:,}"

    def _dense_line(self) -> str:
        return f"left dense, not counted: {sum(part[2] for part in self.dense):,} weights"


def total_macs(parts: Iterable[float | None]) -> float | None:
    """Sum multiply-adds; None if some are not known, or there are none."""
    known = list(parts)
    return None if not known or None in known else sum(part for part in known if part is not None)


def _share(left: float | None, macs: float | None) -> float:
    return left / macs if left is not None and macs else 0.0


def _fraction(zeros: int, weights: int) -> float:
    return zeros / weights if weights else 0.0


def _percent(fraction: float) -> str:
    text = f"{100 * fraction:.2f} %"
    # 100 % means that no weight remains, so it must not result from rounding.
    return "99.99 %" if text == "100.00 %" and fraction < 1 else text
