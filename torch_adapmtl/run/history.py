"""The history of a run: a bounded record of sparsity, thresholds, task weights and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, isnan
from typing import Any, Literal

import torch
from torch import Tensor

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl._tables import html_table, text_table
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods._base import Controller
from torch_adapmtl.weighting._base import LossWeighting

__all__ = ["History", "Recorder", "is_progress"]

# Number of rows at most: more than a picture can show, and small besides a model.
_ROWS = 256
# Number of rows that a table shows.
_SHOWN = 6


@dataclass(frozen=True, repr=False)
class History:
    """Sparsity, thresholds, task weights and losses over a run: `pruner.history`.

    The pruner records a row at most 256 times in a run, at equal distances and at the end. (If a
    run goes on, by `retarget`, every second row is dropped when there is no more room, and the
    distance doubles.) All lists have one entry for each row.

    Attributes:
        steps: The step of each row, counted from `apply_adapmtl` on, over all calls of `retarget`.
        sparsity: Zeros as a fraction of the prunable weights, by component, and `"overall"`. They
            are counted exactly.
        pruned: What is pruned as a fraction of what the target counts: the overall sparsity, or the
            share of the multiply-adds that the zeros save.
        thresholds: The smallest and the largest threshold of the layers of each component. Once
            the zeros are fixed, they are those of the last update. Empty if the method prunes by
            masks alone.
        task_weights: The weight of each task's loss.
        losses: The loss of each task in the last call of `pruner.loss`, without its weight; None if
            the task had no loss, or one of 0, which says the same, or one that is not finite. In
            several processes, the mean.
        target_sparsity: What is to be pruned at the end, as a fraction of what `count` says.
        count: What the target counts: `"weights"` or `"macs"`.

    Example:
        >>> import torch
        >>> from torch_adapmtl import apply_adapmtl
        >>> model = torch.nn.Linear(4, 4)
        >>> pruner = apply_adapmtl(
        ...     model, target_sparsity=0.5, total_steps=30, groups={"main": ["*"]}
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(30):
        ...     pruner.loss(
        ...         {"main": model(torch.randn(2, 4)).square().mean()}
        ...     ).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> history = pruner.history
        >>> len(history), history.steps[-1], history.sparsity["overall"][-1]
        (30, 30, 0.5)
        >>> list(history.rows()[-1])  # doctest: +NORMALIZE_WHITESPACE
        ['step', 'sparsity/main', 'sparsity/overall',
         'threshold_min/main', 'threshold_max/main',
         'task_weight/main', 'loss/main']
    """

    steps: list[int]
    sparsity: dict[str, list[float]]
    pruned: list[float]
    thresholds: dict[str, list[tuple[float, float]]]
    task_weights: dict[str, list[float]]
    losses: dict[str, list[float | None]]
    target_sparsity: float
    count: Literal["weights", "macs"] = "weights"

    def __post_init__(self) -> None:
        pairs = {name: [(low, high) for low, high in p] for name, p in self.thresholds.items()}
        object.__setattr__(self, "thresholds", pairs)  # JSON makes lists of them

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self) -> list[dict[str, float]]:
        """Return the rows as dicts from name to number, with the names of `Report.scalars`.

        A task without a loss is left out. With `wandb`:
        `for row in pruner.history.rows(): wandb.log(row, step=row["step"])`. As a table of pandas:
        `pandas.DataFrame(pruner.history.rows())`.
        """
        names = list(self.losses)
        return [
            {
                "step": step,
                **{f"sparsity/{name}": values[i] for name, values in self.sparsity.items()},
                **({} if self.count == "weights" else {"macs_pruned": self.pruned[i]}),
                **{f"threshold_min/{name}": pairs[i][0] for name, pairs in self.thresholds.items()},
                **{f"threshold_max/{name}": pairs[i][1] for name, pairs in self.thresholds.items()},
                **{f"task_weight/{name}": self.task_weights[name][i] for name in names},
                **{
                    f"loss/{name}": loss
                    for name in names
                    if (loss := self.losses[name][i]) is not None
                },
            }
            for i, step in enumerate(self.steps)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as dicts, lists, strings and numbers, which JSON can hold.

        `History(**history.to_dict())` is equal to `history`.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        if not self.steps:
            return "History(no rows)"
        return f"History({len(self)} rows, steps {self.steps[0]} to {self.steps[-1]})"

    def __str__(self) -> str:
        lines = text_table(self._table(), left=0) if self.steps else []
        return "\n".join([*lines, repr(self)])

    def _repr_html_(self) -> str:
        return f"<div>{html_table(self._table(), left=0, caption=repr(self))}</div>"

    def _table(self) -> list[list[str]]:
        """A few of the rows, at equal distances; the last one is among them."""
        count, shown = len(self), min(len(self), _SHOWN)
        table = [["step", *self.sparsity]]
        table[0] += [f"{kind} {task}" for kind in ("weight", "loss") for task in self.losses]
        for i in ((k + 1) * count // shown - 1 for k in range(shown)):
            losses = (values[i] for values in self.losses.values())
            table.append(
                [
                    f"{self.steps[i]:,}",
                    *(f"{100 * values[i]:.2f} %" for values in self.sparsity.values()),
                    *(f"{values[i]:.2f}" for values in self.task_weights.values()),
                    *("" if loss is None else f"{loss:.4g}" for loss in losses),
                ]
            )
        return table


class Recorder(KeepsPrecision):
    """Records rows of the history on the device, without waiting for it.

    Args:
        components: The names of the components.
        layers: The layers.
        tasks: The task names.
        total_steps: Number of steps of the run.

    Attributes:
        rows: The rows, float64 numbers whose bits are stored as int64, so that averages of a state
            dict copy them and do not average them.
        used: Number of rows recorded.
        interval: Number of steps between two rows.
        last: The step of the last row.
        start: What has to be added to the step count of the run: the steps of earlier runs.
    """

    rows: Tensor
    members: Tensor
    costs: Tensor

    def __init__(
        self, components: Sequence[str], layers: Layers, tasks: Sequence[str], total_steps: int
    ) -> None:
        super().__init__()
        self.components, self.tasks = tuple(components), tuple(tasks)
        self.total_cost = layers.total_cost
        members = [[layer.component == name for layer in layers] for name in components]
        self.sizes = [
            sum(size for size, own in zip(layers.sizes, row, strict=True) if own) for row in members
        ]
        width, device = sum(self._widths()), layers.device
        rows = torch.zeros(_ROWS, width, dtype=torch.int64, device=device)
        costs = torch.tensor(layers.costs, dtype=torch.float64, device=device)
        self.register_buffer("rows", rows)
        self.register_buffer("members", torch.tensor(members, device=device), persistent=False)
        self.register_buffer("costs", costs, persistent=False)
        self.used, self.last, self.start = 0, 0, 0
        self.interval = -(-total_steps // _ROWS)
        # The result of `postfix`, with the step and the target that it was made for.
        self._postfix: tuple[int, float, dict[str, str]] | None = None

    def _widths(self) -> list[int]:
        """The number of columns of the step, what is pruned, zeros, thresholds, weights, losses."""
        parts, tasks = len(self.components), len(self.tasks)
        return [1, 1, parts, parts, parts, tasks, tasks]

    # --- in the training loop ---------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Make room if a row is due after `step` steps, and return whether it still is."""
        since = self.start + step - self.last
        if since >= self.interval and self.used == _ROWS:
            self._thin()
        return since >= self.interval

    @torch.no_grad()
    def _thin(self) -> None:
        """Drop every second row, not the last one, and double the interval."""
        self.used, self.interval = _ROWS // 2, 2 * self.interval
        self.rows[: self.used] = self.rows[1::2].clone()

    @torch.no_grad()
    def record(
        self, step: int, layers: Layers, controller: Controller, weighting: LossWeighting
    ) -> None:
        """Record a row after `step` steps of the run; does not wait for the device.

        It reads every weight, on the device. If there is a row of this step already, it is
        replaced.
        """
        if any(layer.held is None for layer in layers):
            return  # the pruner raises an error at its next update
        step, device = self.start + step, self.rows.device
        zeros, thresholds = layers.zeros().double(), controller.thresholds().double()
        others, spread = ~self.members, thresholds.expand_as(self.members)
        loss, _, observed = weighting.record.latest.double()
        parts = [
            torch.full((1,), float(step), dtype=torch.float64, device=device),
            (zeros * self.costs).sum(0, keepdim=True) / self.total_cost,
            (zeros * self.members).sum(1),
            spread.masked_fill(others, inf).amin(1),
            spread.masked_fill(others, -inf).amax(1),
            weighting.weights().double(),
            loss.masked_fill(observed == 0, float("nan")),
        ]
        if step <= self.last and self.used:
            self.used -= 1
        elif self.used == _ROWS:
            self._thin()
        row = torch.cat([part.to(device) for part in parts])
        self.rows[self.used].copy_(row.view(torch.int64))
        self.used, self.last, self._postfix = self.used + 1, step, None

    # --- results ----------------------------------------------------------------------------------

    def history(self, controller: Controller, layers: Layers, rows: int = _ROWS) -> History:
        """Return the last rows as a history; waits for the device."""
        first = max(self.used - rows, 0)
        numbers = self.rows[first : self.used].cpu().view(torch.float64)
        step, pruned, zeros, least, most, weights, losses = (
            part.T.tolist() for part in numbers.split(self._widths(), dim=1)
        )
        total = sum(self.sizes)
        by_component = dict(zip(self.components, zip(zeros, self.sizes, strict=True), strict=True))
        sparsity = {
            name: [number / size for number in column]
            for name, (column, size) in by_component.items()
        }
        sparsity["overall"] = [sum(column) / total for column in zip(*zeros, strict=True)]
        thresholds = {
            name: list(zip(low, high, strict=True))
            for name, low, high in zip(self.components, least, most, strict=True)
        }
        return History(
            steps=[int(number) for number in step[0]],
            sparsity=sparsity,
            pruned=pruned[0],
            thresholds=thresholds if controller.has_thresholds else {},
            task_weights=dict(zip(self.tasks, weights, strict=True)),
            losses={
                task: [None if isnan(loss) else loss for loss in column]
                for task, column in zip(self.tasks, losses, strict=True)
            },
            target_sparsity=controller.target_sparsity,
            count=layers.counts,
        )

    def postfix(self, controller: Controller, layers: Layers) -> dict[str, str]:
        """Return the last row in short words; waits for the device if it is a new one."""
        made_for = self.last, controller.target_sparsity
        if self._postfix is None or self._postfix[:2] != made_for:
            last = self.history(controller, layers, rows=1)
            words = {}
            if len(last):
                name = "sparsity" if last.count == "weights" else "MACs pruned"
                words[name] = f"{last.pruned[0]:.1%} of {last.target_sparsity:.1%}"
                weights = (f"{task} {values[0]:.2f}" for task, values in last.task_weights.items())
                words["weights"] = ", ".join(weights)
            self._postfix = *made_for, words
        return dict(self._postfix[2])

    # --- state ------------------------------------------------------------------------------------

    def progress(self) -> list[int]:
        """Return the numbers that the buffers do not hold."""
        return [self.used, self.interval, self.last, self.start]

    def set_progress(self, progress: Sequence[int]) -> None:
        """Set what `progress` returned."""
        self.used, self.interval, self.last, self.start = progress
        self._postfix = None


def is_progress(found: object) -> bool:
    """Whether this can be the result of `Recorder.progress`."""
    if not isinstance(found, list) or [type(number) for number in found] != 4 * [int]:
        return False
    used, interval, _, _ = found
    return bool(0 <= used <= _ROWS and interval > 0)
