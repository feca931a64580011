"""The random numbers that are functions of keys."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_adapmtl.datasets._random import bell_triples, mix, rough_uniform, uniform


def mix_plainly(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_mix_is_splitmix64(values: list[int]) -> None:
    mixed = mix(torch.tensor(values)).tolist()
    assert [m % 2**64 for m in mixed] == [mix_plainly(v) for v in values]
    expected = [(mix_plainly(v) >> 40) / 2**24 for v in values]
    assert uniform(torch.tensor(values)).tolist() == expected


def test_random_numbers_have_the_distribution_they_claim() -> None:
    keys = torch.arange(200_000)
    for values in (uniform(keys), rough_uniform(keys)):
        assert values.min() >= 0
        assert values.max() < 1
        shares = torch.histc(values, 20, 0, 1) / len(keys)
        assert (shares - 0.05).abs().max() < 0.003
        lagged = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert abs(float(lagged)) < 0.01
    bells = bell_triples(keys)
    assert bells.shape == (3, 200_000)
    assert bells.mean(1).abs().max() < 0.01
    torch.testing.assert_close(torch.cov(bells), torch.eye(3), atol=0.01, rtol=0)
    assert bells.abs().max() < 3.4
