"""The oracle of the frameworks: the loop of three lines over the same batches."""

from __future__ import annotations

import torch
from torch import nn
from toys import TwoTasks, losses, prepare, tensors

from torch_adapmtl import SparsitySchedule

EARLY = SparsitySchedule(start=0.0, end=0.5)


def plain(total: int, accumulate: int = 1, same: bool = False) -> nn.Module:
    """The oracle: the loop of three lines over the same batches, or the first again and again."""
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, total_steps=total, schedule=EARLY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for index in range(total * accumulate):
        (pruner.loss(losses(model, 0 if same else index)) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
    pruner.finalize()
    return model


def assert_like(model: nn.Module, oracle: nn.Module) -> None:
    expected = tensors(oracle)
    assert list(tensors(model)) == list(expected)
    for key, value in tensors(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
    assert sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2) == round(0.8 * 168)
