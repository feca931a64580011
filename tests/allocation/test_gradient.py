"""Offsets that the optimiser trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import Error, raises
from toys import TwoTasks, losses, prepare, train, weights, zeros

from torch_adapmtl import GradientAllocation


def test_gradient_moves_offsets() -> None:
    model = TwoTasks()
    pruner = prepare(
        model, total_steps=60, allocation=GradientAllocation(bound=0.4), gradient="mask"
    )
    own, learned = pruner.param_groups(lr=0.05, weight_decay=0.1, threshold_lr=0.3)
    assert (own["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
    assert (own["lr"], learned["lr"]) == (0.05, 0.3)
    assert {id(p) for p in learned["params"]} == {id(p) for p in pruner.parameters()}
    optimizer = torch.optim.SGD([own, learned])
    train(model, pruner, optimizer, range(30))
    pruner.loss(losses(model, 30)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pruner.parameters())
    assert pruner.controller.offsets.by_layer().unique().numel() > 1
    assert pruner.controller.offsets.by_layer().abs().max() > 0.01
    train(model, pruner, optimizer, range(30, 60))
    assert zeros(pruner) == round(0.8 * weights(pruner))
    assert pruner.controller.offsets.by_layer().abs().max() <= 0.4


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"bound": 0}, ValueError, "bound", "got 0", "> 0"),
        ({"bound": "x"}, TypeError, "bound", "'x'", "be a number"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: GradientAllocation(**options), error, f"allocation: {named}", found, remedy)
