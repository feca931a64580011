"""What a method is tried on: data, model, tasks and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from examples.benchmark.data import Data
from torch_adapmtl import Paper
from torch_adapmtl.components._prunable import Prunable
from torch_adapmtl.tasks import Task

__all__ = ["Problem"]


# Of four pairs, the best on the problems to choose on of those that end near the target
# (docs/results/published.jsonl).
_PAPER = Paper(start=-6.0, weight_decay=1.0)


@dataclass(frozen=True)
class Problem:
    """What is trained, on what, and how; the same for every method.

    Attributes:
        name: Its name.
        load: Makes the training and the test set.
        make_model: Makes the model, with random weights.
        make_tasks: Makes the tasks, by the names of the model's outputs.
        steps: Optimiser steps.
        batch: Samples in a batch.
        lr: Learning rate of Adam at the start; it falls to 0 along a cosine.
        weight_decay: Of Adam (L2).
        threshold_lr: Learning rate of the paper's thresholds.
        paper: Start and decay of the paper's thresholds; by default a pair for short runs.
        pretraining: Steps that a dense net is trained before, at a constant rate; the run starts
            from that net.
        prunable: What is prunable besides the weights of convolutions and linear layers.

    Example:
        >>> from dataclasses import replace
        >>> from examples.benchmark import find_problem
        >>> # or make one of your own
        >>> shorter = replace(find_problem("digits"), steps=100)
        >>> list(shorter.make_tasks())
        ['left', 'right', 'distance']
    """

    name: str
    load: Callable[[], tuple[Data, Data]]
    make_model: Callable[[], nn.Module]
    make_tasks: Callable[[], dict[str, Task]]
    steps: int
    batch: int
    lr: float = 2e-3
    weight_decay: float = 1e-4
    threshold_lr: float = 4e-2
    paper: Paper = _PAPER
    pretraining: int = 0
    prunable: Prunable | None = None

    @property
    def lower_is_better(self) -> list[tuple[str, str]]:
        """The metrics of which less is better, as `relative_performance` takes them."""
        tasks = self.make_tasks()
        return [
            (name, metric)
            for name, task in tasks.items()
            for metric in task.metrics
            if metric in task.lower_is_better
        ]
