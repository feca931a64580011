"""Small tensors stay small in the tests, so that others have entries of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torch_adapmtl.storage import save


@pytest.fixture(scope="package", autouse=True)
def few_small_tensors() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "SMALL", 2**12)
        yield
