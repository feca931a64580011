"""Sensitivity: whose threshold is lower, and what leaves the offsets alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from refusals import Error, raises
from torch import nn
from toys import TwoTasks, losses, prepare, train

from torch_adapmtl import Pruner, SensitivityAllocation


def _two_heads(seed: int, **options: Any) -> Pruner:
    """Two equal heads; all that one does is counted, next to nothing of the other."""
    torch.manual_seed(seed)
    model = TwoTasks(24)
    model.heads["b"] = nn.Linear(24, 5)
    pruner = prepare(model, total_steps=150, weighting="equal", **options)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=3e-3))
    for _ in range(149):
        x = torch.randn(16, 6)
        a, b = model(x).values()
        truth = torch.cat([x.sin(), x.cos()], 1)
        found = {
            "a": (a - truth[:, :5]).square().mean(),
            "b": 1e-4 * (b - truth[:, 5:10]).square().mean(),
        }
        pruner.loss(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return pruner


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("granularity", ["layer", "component"])
def test_what_matters_has_the_lower_threshold(seed: int, granularity: Any) -> None:
    pruner = _two_heads(seed, granularity=granularity, allocation="sensitivity")
    offset = dict(
        zip(["shared", "a", "b"], pruner.controller.offsets.by_layer().tolist(), strict=True)
    )
    assert offset["a"] + 0.5 < offset["b"]
    assert max(map(abs, offset.values())) <= 1.1 + 1e-6
    sparsity = pruner.sparsity("component")
    assert sparsity["a"] < sparsity["b"]


def test_gradients_that_are_not_finite_leave_the_offsets_alone() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=40, allocation="sensitivity")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(20))
    before = pruner.controller.allocator.saliency.clone()
    (losses(model, 20)["a"] * math.inf).backward()  # as under a gradient scaler that skips
    optimizer.zero_grad()
    pruner.step()
    assert torch.equal(pruner.controller.allocator.saliency, before * 0.9)
    assert pruner.controller.offsets.by_layer().isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"rate": 0}, ValueError, "rate", "rate=0", "> 0"),
        ({"rate": "x"}, TypeError, "rate", "'x'", "be a number"),
        ({"bound": -1}, ValueError, "rate and bound", "bound=-1", "> 0"),
        ({"decay": 1.0}, ValueError, "decay", "decay=1.0", "in [0, 1)"),
        (
            {"prior": math.inf},
            ValueError,
            "decay must lie in [0, 1) and prior",
            "prior=inf",
            ">= 0",
        ),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: SensitivityAllocation(**options), error, f"allocation: {named}", found, remedy)
