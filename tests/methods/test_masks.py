"""Masks on the lowest scores: ties, what is not a number, and masks that were there before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Row, assert_refused, call
from torch import nn
from torch.nn.utils import prune
from toys import TwoTasks

from torch_adapmtl import Magnitude
from torch_adapmtl.methods.masks import lowest


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    levels=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_lowest_is_a_stable_sort(
    sizes: Sequence[int], levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(levels, (n,), generator=generator).float() for n in sizes]
    count = int(share * sum(sizes))
    marked = lowest(scores, count)
    assert [len(part) for part in marked] == list(sizes)
    expected = torch.zeros(sum(sizes), dtype=torch.bool)
    expected[torch.cat(scores).sort(stable=True).indices[:count]] = True
    assert torch.equal(torch.cat(marked), expected)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    levels=st.integers(1, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    costs=st.lists(st.sampled_from([1.0, 2.5, 64.0]), min_size=4, max_size=4),
)
def test_lowest_is_a_stable_sort_of_costs(
    sizes: Sequence[int], levels: int, share: float, seed: int, costs: list[float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(levels, (n,), generator=generator).float() for n in sizes]
    each = [cost for n, cost in zip(sizes, costs, strict=False) for _ in range(n)]
    budget, pruned = share * sum(each), 0.0
    expected = [False] * len(each)
    for i in torch.cat(scores).sort(stable=True).indices.tolist():
        if pruned + each[i] / 2 >= budget:
            break
        expected[i] = True
        pruned += each[i]
    assert torch.cat(lowest(scores, budget, costs[: len(sizes)])).tolist() == expected
    assert abs(pruned - budget) <= max(each, default=0) / 2 + 1e-9


def test_lowest_takes_what_is_gone_before_nan_and_nan_before_the_rest() -> None:
    scores = torch.tensor([3.0, torch.nan, -torch.inf, -1e38, torch.inf, torch.nan, -torch.inf])
    order = [2, 6, 1, 5, 3, 0, 4]
    for count in range(len(order) + 1):
        (marked,) = lowest([scores], count)
        assert marked.nonzero().flatten().tolist() == sorted(order[:count])


def with_masks() -> nn.Module:
    model = TwoTasks()
    prune.random_unstructured(model.body, "weight", amount=40)
    return model


def test_more_masked_than_the_target_is_refused() -> None:
    do = call(target_sparsity=0.1, method=Magnitude())
    assert_refused(
        Row("", do, ValueError, "target_sparsity=0.1", "hold 40", "raise the target",
            model=with_masks, goes_on=False)
    )  # fmt: skip
