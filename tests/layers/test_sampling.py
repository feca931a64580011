"""Where a layer is sampled, and what a sample stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_adapmtl.layers import sampling


@given(st.integers(1, 5000), st.integers(1, 200))
def test_samples_are_spread_evenly(size: int, wanted: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLE", wanted)
        patch.setattr(sampling, "LAYER_SAMPLE", 1)
        found = sampling.positions(size, size, torch.device("cpu"))
        if wanted >= size:
            assert found is None
            return
        assert found is not None
        assert len(set(found.tolist())) == wanted == len(found)
        around = torch.cat([found.sort().values, found.min()[None] + size])
        assert around.diff().max() <= 2 * size / wanted + 2
