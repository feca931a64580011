"""Finetuning with the zeros kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sparse_models import assert_within, count, gone, seen, sparse_model
from torch import nn
from torch.nn.utils import prune
from toys import TwoTasks, batch, losses, prepare, pruned, train, weights, zeros

from torch_adapmtl import (
    Pruner,
    keep_zeros,
    release_zeros,
)


def finetune(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(10):
        sum(losses(model, step).values()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("momentum", ["fresh", "old"])
def test_nothing_revives_a_zero(make: Any, momentum: str) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = make(model.parameters())
    train(model, pruner, optimizer, range(20))
    pruner.finalize()
    keys, where, before = list(model.state_dict()), gone(model), seen(model)
    x = batch(99)[0]
    outputs = model(x)
    if momentum == "old":
        with pytest.warns(UserWarning, match=r"after finalize.*do not stay zero.*keep_zeros"):
            finetune(model, optimizer)
        assert count(gone(model)) < count(where)
        model.load_state_dict({**model.state_dict(), **before}, strict=False)
        outputs = model(x)
    else:
        optimizer = make(model.parameters())
    assert keep_zeros(model) is model
    assert all(torch.equal(out, outputs[task]) for task, out in model(x).items())
    finetune(model, optimizer)
    assert count({name: weight == 0 for name, weight in seen(model).items()}) == count(where)
    assert_within(model, where)
    assert any(not torch.equal(weight, before[name]) for name, weight in seen(model).items())
    outputs = model(x)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert release_zeros(one) is one
        assert list(one.state_dict()) == keys
        assert not prune.is_pruned(one)
        assert type(one.body) is nn.Linear
        assert all(torch.equal(out, outputs[task]) for task, out in one(x).items())
        assert count(gone(one)) == count(where)


def test_kept_zeros_are_saved() -> None:
    model = keep_zeros(sparse_model())
    finetune(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fresh = keep_zeros(sparse_model(0.5))  # other zeros
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(weight, seen(model)[name]) for name, weight in seen(fresh).items())
    mine, theirs = gone(release_zeros(fresh)), gone(release_zeros(model))
    assert all(torch.equal(zero, theirs[name]) for name, zero in mine.items())


def test_which_tensors_keep_their_zeros() -> None:
    model = sparse_model()
    model.words = nn.Embedding(5, 4, padding_idx=0)
    model.new = nn.Linear(4, 4)
    nn.init.zeros_(model.new.weight)  # not trained yet
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    prune.random_unstructured(model.heads["a"], "weight", 0.5)
    mask = model.heads["a"].weight_mask.clone()
    keep_zeros(model)
    layers = model.kept_zeros.sparse_weights.layers
    assert [layer.name for layer in layers] == ["body.weight", "heads.a.weight", "heads.b.weight"]
    assert len(layers[0].owners) == 2
    release_zeros(model)
    assert model.twin.weight is model.body.weight
    assert torch.equal(model.heads["a"].weight_mask, mask)


def test_when_zeros_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"TwoTasks has no tensor with zeros.*after finalize"):
        keep_zeros(TwoTasks())
    model = TwoTasks()
    pruner = prepare(model)
    for call in (keep_zeros, release_zeros):
        with pytest.raises(RuntimeError, match=r"being pruned; call finalize\(\) on its pruner"):
            call(model)
    pruner.fix_zeros()
    pruner.finalize()
    keep_zeros(model)
    with pytest.raises(RuntimeError, match=r"'body.weight' are kept already: leave out"):
        keep_zeros(model)
    with pytest.raises(ValueError, match=r"'body.weight' .* zeros are kept: .*release_zeros"):
        prepare(model)
    handle = prepare(release_zeros(model), target_sparsity=0.9)
    assert isinstance(handle, Pruner)
    assert zeros(handle) == round(0.8 * weights(handle))
    assert len(pruned(handle)) == 3


class Adapted(nn.Linear):
    """A linear layer with a low-rank part of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.low = nn.Parameter(torch.randn(2, width))


def test_tensors_of_subclasses_and_embeddings() -> None:
    model = nn.ModuleDict({"a": Adapted(4), "words": nn.Embedding(5, 3, padding_idx=0)})
    with torch.no_grad():
        model["a"].low[0] = 0.0
    keep_zeros(model)
    assert model["a"].low.requires_grad
    assert [layer.name for layer in model["kept_zeros"].sparse_weights.layers] == ["a.low"]
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert not release_zeros(model)["a"].low[0].any()

    model["words"].sparse = True
    with torch.no_grad():
        model["words"].weight[2] = 0.0
    keep_zeros(model)
    model["words"](torch.tensor([1, 2])).square().sum().add(model["words"].weight.sum()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not release_zeros(model)["words"].weight[2].any()


def test_only_masks_of_keep_zeros_are_released() -> None:
    model = TwoTasks()
    prepare(model)
    pruner = model.adapmtl
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(15))
    before = zeros(pruner)
    release_zeros(model.body)  # a part of a model that is being pruned
    assert zeros(pruner) == before > 0
    assert prune.is_pruned(model)


def test_kept_zeros_train_after_inference_mode() -> None:
    model, other = sparse_model(), TwoTasks()
    prepare(other).fix_zeros()
    state = copy.deepcopy(other.state_dict())
    prepared = TwoTasks()
    prepare(prepared)
    with torch.inference_mode():
        keep_zeros(model)
        prepared.load_state_dict(state)
    finetune(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finetune(prepared, torch.optim.SGD(prepared.parameters(), lr=0.1))
