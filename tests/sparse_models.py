"""Models that are sparse, and where their weights are zero."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from toys import TwoTasks, prepare, train

NAMES = ("body.weight", "heads.a.weight", "heads.b.weight")


def sparse_model(sparsity: float = 0.6) -> TwoTasks:
    """A model of which that share of the weights is zero."""
    model = TwoTasks()
    model.load_state_dict(_pruned(sparsity))
    return model


@functools.cache
def _pruned(sparsity: float) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, target_sparsity=sparsity)
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
        return pruner.finalize().state_dict()


def gone(model: nn.Module) -> dict[str, Tensor]:
    """Where the parameters of a model without thresholds are zero."""
    return {name: model.get_parameter(name) == 0 for name in NAMES}


def count(where: dict[str, Tensor]) -> int:
    return sum(int(zero.sum()) for zero in where.values())


def seen(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with."""
    found = {}
    for name in NAMES:
        path, _, last = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), last).detach().clone()
    return found


def assert_within(model: nn.Module, where: dict[str, Tensor]) -> None:
    assert all(not seen(model)[name][zero].any() for name, zero in where.items())
