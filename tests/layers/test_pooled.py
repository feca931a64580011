"""One number for each pool of layers, against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_adapmtl.layers.pooled import Pooled

CPU = torch.device("cpu")


def without_gaps(drawn: list[int]) -> list[int]:
    """Number the pools from 0, in any order."""
    names = sorted(set(drawn))
    return [names.index(pool) for pool in drawn]


POOLS = st.lists(st.integers(0, 4), min_size=1, max_size=8).map(without_gaps)


@given(pool=POOLS, value=st.floats(-3, 3), trained=st.booleans(), data=st.data())
def test_is_what_plain_loops_say(
    pool: list[int], value: float, trained: bool, data: st.DataObject
) -> None:
    pooled = Pooled(pool, value=value, device=CPU, trained=trained)
    start = torch.tensor(value, dtype=torch.float32).item()
    assert pooled.values.tolist() == [start] * len(set(pool))
    assert isinstance(pooled.values, nn.Parameter) == trained
    assert list(pooled.state_dict()) == ["values"]

    count = len(set(pool))
    numbers = data.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count))
    spread = torch.tensor([float(numbers[p]) for p in pool])
    with torch.no_grad():
        pooled.assign(spread)
    assert pooled.values.tolist() == numbers
    assert pooled.by_layer().tolist() == spread.tolist()
    assert not pooled.by_layer().requires_grad
    assert [pooled.of(i).item() for i in range(len(pool))] == spread.tolist()

    own = data.draw(st.lists(st.integers(-9, 9), min_size=len(pool), max_size=len(pool)))
    sums = [sum(o for o, q in zip(own, pool, strict=True) if q == p) for p in pool]
    assert pooled.sum(torch.tensor(own, dtype=torch.float64)).tolist() == sums


def test_the_number_of_a_layer_has_a_gradient() -> None:
    pooled = Pooled([0, 1, 0], device=CPU, trained=True)
    (2 * pooled.of(0) + 3 * pooled.of(2) + 5 * pooled.of(1)).backward()
    assert pooled.values.grad is not None
    assert pooled.values.grad.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("trained", [False, True])
def test_keeps_its_precision_and_is_copied(trained: bool) -> None:
    pooled = Pooled([0, 1], value=1 / 3, device=CPU, trained=trained)
    twin = copy.deepcopy(pooled).half()
    assert twin.values.dtype == torch.float32
    assert twin.by_layer().tolist() == pooled.by_layer().tolist()
