"""How a refusal is checked: what the error says, that nothing is touched, and what comes next.

A row of a table is a misuse. Its error names the argument, the value found and the remedy. The
model is as it was after it, bit for bit, and what is done next (a run from the beginning, or the
rest of one) is what it would have been.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, tensors, train, weights, zeros
from untouched import assert_untouched

STEPS = 8
Error = type[Exception]


def raises(do: Callable[[], object], error: Error, *parts: str) -> None:
    """Check that an error is raised and that its message holds all parts."""
    with pytest.raises(error) as caught:
        do()
    message = str(caught.value)
    for part in parts:
        assert part in message, message


@dataclass
class Scene:
    """What a misuse has at hand: a model and, in the middle of a run, its pruner and optimiser."""

    model: Any
    pruner: Any = None
    optimizer: Any = None
    wrapped: Any = None


@dataclass(frozen=True)
class Row:
    """A misuse, and the error that it gives.

    Attributes:
        id: What is wrong, in words.
        do: The misuse.
        error: The type of the error.
        named: What the message must name: the argument, or the object.
        found: What it must say was found.
        remedy: What it must say to do.
        model: What makes the model.
        after: Steps trained before; None if the model has not been prepared.
        options: How it was prepared.
        ignored: Buffers that the error may change: the count that it reports.
        goes_on: Whether the model can be pruned and trained afterwards.
        first: What comes before the misuse.
    """

    id: str
    do: Callable[[Scene], object]
    error: Error
    named: str
    found: str
    remedy: str
    model: Callable[[], nn.Module] = TwoTasks
    after: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ignored: Collection[str] = ()
    goes_on: bool = True
    first: Callable[[Scene], object] = id

    def scene(self) -> Scene:
        torch.manual_seed(0)
        model: Any = self.model()
        scene = Scene(model)
        if self.after is not None:
            scene.pruner = prepare(model, **{"total_steps": STEPS, **self.options})
            scene.optimizer = torch.optim.SGD(scene.pruner.param_groups(lr=0.1))
            train(model, scene.pruner, scene.optimizer, range(self.after))
        self.first(scene)
        return scene


def rows(table: Sequence[Row]) -> pytest.MarkDecorator:
    """Run a test once for each row of a table, as `row`."""
    return pytest.mark.parametrize("row", table, ids=lambda row: row.id)


def call(**options: Any) -> Callable[[Scene], object]:
    """Prepare the scene's model with these options."""
    return lambda scene: prepare(scene.model, **{"total_steps": STEPS, **options})


def option(id: str, error: Error, named: str, found: str, remedy: str, **options: Any) -> Row:
    """A call of `apply_adapmtl` with a bad option."""
    return Row(id, call(**options), error, named, found, remedy)


def running(
    id: str, do: Callable[[Scene], object], error: Error, named: str, found: str, remedy: str,
    after: int = 3, **rest: Any,
) -> Row:  # fmt: skip
    """A misuse in the middle of a run."""
    return Row(id, do, error, named, found, remedy, after=after, **rest)


def loss(**made: Any) -> Callable[[Scene], object]:
    """Pass these losses to the pruner; a callable takes the real one of its task."""

    def passed(scene: Scene) -> object:
        real = losses(scene.model, 0)
        return scene.pruner.loss(
            {task: how(real.get(task)) if callable(how) else how for task, how in made.items()}
        )

    return passed


def assert_refused(row: Row) -> None:
    """Check a row, all of it."""
    scene = row.scene()

    def misuse() -> None:
        raises(lambda: row.do(scene), row.error, row.named, row.found, row.remedy)

    assert_untouched(scene.model, misuse, row.ignored)
    if row.goes_on:
        usual = row.model is TwoTasks and not row.options and row.first is Row.first
        expected = _usual_rest(row.after) if usual else _the_rest(row.scene(), row.after)
        result = _the_rest(scene, row.after)
        assert list(result) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in result.items())


@functools.cache
def _usual_rest(after: int | None) -> dict[str, Tensor]:
    return _the_rest(Row("", id, Exception, "", "", "", after=after).scene(), after)


def _the_rest(scene: Scene, after: int | None) -> dict[str, Tensor]:
    """Train to the end, or from the beginning, and say what comes out."""
    model, pruner, optimizer = scene.model, scene.pruner, scene.optimizer
    if pruner is None:
        pruner = prepare(model, total_steps=STEPS)
        optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    if hasattr(model, "adapmtl"):
        pruner.weighting.record.nonfinite.zero_()
        train(model, pruner, optimizer, range(pruner.report().step, STEPS))
        pruner.finalize()
        if pruner.controller.exact:
            assert zeros(pruner) == round(pruner.target_sparsity * weights(pruner))
    sum(loss for loss in losses(model, STEPS).values()).backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an optimizer trains .* after finalize")
        optimizer.step()
    return tensors(model)
