"""What DiSparse has beside the plain version of it in test_baselines.py: ranks, moving masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, train, zeros

from torch_adapmtl import DiSparse
from torch_adapmtl.methods.disparse import _ranks


def test_a_rank_is_the_share_of_the_others_below() -> None:
    scores = torch.tensor([2.0, 0.0, torch.inf, torch.nan, 2.0])
    assert _ranks(scores).tolist() == [0.5, 0.25, 1.0, 0.0, 0.5]
    assert _ranks(scores[:1]).tolist() == [0.0]


def test_dynamic_masks_move_and_hide_the_gradient_of_what_is_gone() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=DiSparse(dynamic=True), total_steps=40, weighting="equal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = pruner.layers
    seen = set()
    for step in range(40):
        pruner.loss(losses(model, step)).backward()
        if step:
            for layer in layers:
                assert not layer.weight.grad[~layer.threshold.mask].any()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        seen.add(tuple(bytes(layer.threshold.mask.flatten().tolist()) for layer in layers))
        if step:
            assert sum(int((~layer.threshold.mask).sum()) for layer in layers) == 134
    assert 10 < len(seen) < 40  # they move, and come to rest


def test_disparse_passes_over_a_task_without_prunable_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.shift = nn.Linear(6, 5), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.head(x), "b": x[:, 3:] + self.shift}

    model = Model()
    pruner = prepare(model, method=DiSparse())
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    assert zeros(pruner) == 24
