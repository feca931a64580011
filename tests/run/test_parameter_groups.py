"""`Pruner.param_groups(lr={...})`: a learning rate for each component."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import TwoTasks, prepare, train

from torch_adapmtl import Adaptive, GradientAllocation, SparsitySchedule

RATES = {"shared": 1e-4, "a": 1e-3, "b": 0.0}


class Normed(TwoTasks):
    """`TwoTasks` with parameters that are not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.heads["b"] = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3))


def test_every_parameter_has_the_rate_of_its_component() -> None:
    model = Normed()
    groups = prepare(model).param_groups(lr=RATES, weight_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert found == {
        "body.weight": 1e-4,
        "body.bias": 1e-4,
        "heads.a.weight": 1e-3,
        "heads.a.bias": 1e-3,
        "heads.b.0.weight": 0.0,
        "heads.b.0.bias": 0.0,
        "heads.b.1.weight": 0.0,
        "heads.b.1.bias": 0.0,
    }
    assert all(group["weight_decay"] == 0.5 for group in groups)


def test_only_components_with_a_rate_move() -> None:
    model = Normed()
    pruner = prepare(model, schedule=SparsitySchedule(start=0.5))  # nothing is pruned at first
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=RATES)), range(1))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("heads.b")}


def test_trained_thresholds_have_the_rate_of_the_shared_component() -> None:
    pruner = prepare(Normed(), method=Adaptive(allocation=GradientAllocation()))
    groups = pruner.param_groups(lr=RATES)
    assert [group["lr"] for group in groups] == [1e-4, 1e-3, 0.0, 1e-4]
    groups = pruner.param_groups(lr=RATES, threshold_lr=0.1)
    assert [group["lr"] for group in groups] == [1e-4, 1e-3, 0.0, 0.1]


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ({"shared": 1.0}, r"lr .* the components \['shared', 'a', 'b'\]: missing \['a', 'b'\]"),
        ({**RATES, "c": 1.0}, r"unknown \['c'\]"),
        ({**RATES, "a": -1.0}, r"lr\['a'\]"),
    ],
)
def test_other_rates_are_refused(rates: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        prepare(TwoTasks()).param_groups(lr=rates)
