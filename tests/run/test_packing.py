"""Settings, progress and masks as bytes: read as they were written, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import TwoTasks, prepare

from torch_adapmtl.run._packing import pack, unpack, unpack_mask

JSON = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    max_size=4,
)
SIZES = st.lists(st.integers(0, 70), min_size=1, max_size=5)


def packed(header: Any, progress: Any, sizes: list[int], seed: int) -> tuple[Tensor, list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    masks = [
        None if i % 3 == 2 else torch.rand(size, generator=generator) < 0.5
        for i, size in enumerate(sizes)
    ]
    return pack(header, progress, masks, sizes), masks


@given(header=JSON, progress=JSON, sizes=SIZES, seed=st.integers(0, 99))
def test_reads_what_it_wrote(header: Any, progress: Any, sizes: list[int], seed: int) -> None:
    state, masks = packed(header, progress, sizes, seed)
    assert state.dtype == torch.uint8
    assert len(state) == len(pack(header, {}, [None] * len(sizes), sizes))  # whatever the masks
    found_header, found_progress, bits = unpack(state)
    assert (found_header, found_progress) == (header, progress)
    for mask, part, size in zip(masks, bits, sizes, strict=True):
        if mask is None:
            assert part is None
        else:
            assert part is not None
            assert torch.equal(unpack_mask(part, torch.ones(size)), mask)


@given(header=JSON, sizes=SIZES, seed=st.integers(0, 99), data=st.data())
def test_bytes_that_are_no_state(
    header: Any, sizes: list[int], seed: int, data: st.DataObject
) -> None:
    """Cut off, or overwritten in the part that says what the rest is."""
    state, _ = packed(header, {"step": 3}, sizes, seed)
    if data.draw(st.booleans()):
        state = state[: data.draw(st.integers(0, len(state) - 1))]
    else:
        state = state.clone()
        state[data.draw(st.integers(0, 9))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"cannot be read.*load another checkpoint"):
        unpack(state)


def test_a_mask_of_another_model_does_not_fit() -> None:
    found = re.escape("a packed mask of 2 bytes does not fit a weight of shape (3, 6)")
    with pytest.raises(ValueError, match=found):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), torch.ones(3, 6))


def test_a_mask_that_changes_is_packed_anew() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    pruner.fix_zeros()
    first, second = model.state_dict(), model.state_dict()
    assert torch.equal(first["adapmtl._extra_state"], second["adapmtl._extra_state"])
    pruner.layers[0].threshold.mask[0, 0] ^= True
    third = model.state_dict()
    assert not torch.equal(first["adapmtl._extra_state"], third["adapmtl._extra_state"])
