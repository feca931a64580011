"""Densities: kept to by components and layers, or refused with the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Row, Scene, assert_refused, call, option, rows
from torch import nn
from torch.nn.utils import prune
from toys import Bag, TwoTasks, prepare, train, weights, zeros

from torch_adapmtl import Adaptive, apply_adapmtl

V = ValueError


def with_masks() -> nn.Module:
    model = TwoTasks()
    prune.random_unstructured(model.body, "weight", amount=40)
    return model


TABLE = [
    option("a floor of an unknown component", V, "min_density", "'c'", "['shared', 'a', 'b']",
           min_density={"c": 0.6}),
    option("floors above what is left", V, "min_density", "0 to 36 of 72", "Change the target",
           min_density=0.5),
    option("ceilings below it", V, "max_density", "152 to 1", "Change the target",
           max_density=0.1),
    option("a floor above the ceiling", V, "max_density=0.5", "at least 30 and at most 24",
           "Lower the one", min_density={"a": 0.6}, max_density={"a": 0.5}),
    Row("more masked than the target", call(target_sparsity=0.1), V, "target_sparsity=0.1",
        "17 zeros", "Change the target", model=with_masks, goes_on=False),
]  # fmt: skip


@rows(TABLE)
def test_refused(row: Row) -> None:
    assert_refused(row)


DENSITY = st.one_of(st.sampled_from([0.0, 0.2, 1.0, math.nan]), st.floats(-0.2, 1.2))


def refuse(do: Callable[[Scene], object], named: str, *parts: str) -> None:
    found, remedy = parts
    assert_refused(Row("", do, V, named, found, remedy, goes_on=False))


@settings(max_examples=100)
@given(
    target=st.floats(0, 0.99),
    least=st.dictionaries(st.sampled_from(["shared", "a", "b"]), DENSITY, max_size=3),
    most=st.dictionaries(st.sampled_from(["shared", "a", "b", "c"]), DENSITY, max_size=3),
)
def test_densities_are_kept_or_refused(
    target: float, least: dict[str, float], most: dict[str, float]
) -> None:
    do = call(target_sparsity=target, min_density=least, max_density=most)
    if not all(0 <= density <= 1 for density in (*least.values(), *most.values())):
        refuse(do, "_density of", "got", "in [0, 1]")
        return
    if "c" in most:
        refuse(do, "max_density", "'c'", "name one of the components ['shared', 'a', 'b']")
        return
    model = TwoTasks()
    try:
        pruner: Any = do(Scene(model))
    except ValueError as refusal:
        words = ("no room", "Lower") if "no room" in str(refusal) else ("zeros", "Change the")
        refuse(do, "_density", *words)
        return
    pruner.fix_zeros()
    assert zeros(pruner) == round(target * weights(pruner))
    for name, sparsity in pruner.sparsity("component").items():
        size = sum(t.parameter.numel() for t in pruner.components[name])
        kept = (1 - sparsity) * size
        assert least.get(name, 0.0) * size - 1e-4 <= kept + 1
        assert kept - 1 <= most.get(name, 1.0) * size + 1e-4


@given(
    least=st.floats(0, 0.3),
    most=st.floats(0.05, 1),
    target=st.floats(0.3, 0.8),
    seed=st.integers(0, 999),
)
@settings(max_examples=12)
def test_densities_stay_within_their_bounds(
    least: float, most: float, target: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = TwoTasks()
    with torch.no_grad():
        model.heads["a"].weight.mul_(1e-3)  # left to itself it would lose everything
        model.heads["b"].weight.mul_(1e3)
    pruner = prepare(
        model, target_sparsity=target, min_density={"a": least}, max_density={"b": most}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(20):
        train(model, pruner, optimizer, [step])
        assert 1 - pruner.sparsity("component")["a"] >= least - 1e-9
    density = {name: 1 - s for name, s in pruner.sparsity("component").items()}
    assert density["a"] >= least - 1e-9
    assert density["b"] <= most + 1e-9
    assert zeros(pruner) == round(target * weights(pruner))


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 0.9, 0.07, 0.57, 0.29])
def test_a_bound_that_is_met_exactly_is_feasible(density: float) -> None:
    for bound in ("min_density", "max_density"):
        pruner = apply_adapmtl(
            Bag([(20, 5)], torch.float32),
            target_sparsity=1 - density,
            total_steps=1,
            groups={"a": ["*"]},
            method=Adaptive(**{bound: density}),
        )
        pruner.fix_zeros()
        assert zeros(pruner) == round((1 - density) * 100)


def test_no_layer_dies() -> None:
    model = Bag([(30, 30), (30, 30), (20, 5)], torch.float32)
    with torch.no_grad():
        model.layers[1].weight.mul_(1e-4)
        model.layers[2].weight.zero_()
    groups = {"a": ["layers.0"], "b": ["layers.1", "layers.2"]}
    pruner = apply_adapmtl(model, target_sparsity=0.5, total_steps=50, groups=groups)
    for _ in range(50):
        pruner.step()
    density = [1 - s for s in pruner.sparsity("layer").values()]
    assert min(density) >= 0.05  # a tenth of the average
    assert density[0] > 0.9
