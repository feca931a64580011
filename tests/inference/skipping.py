"""What the tests of the sparse layers share: kernels of each width, comparisons, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_adapmtl.inference import _call, _filters, _map_modules
from torch_adapmtl.inference._kernels.compile import kernels
from torch_adapmtl.inference._maps import held

TOLERANCE = 1e-5  # of the largest output

# NEON, AVX2 and AVX-512: LLVM splits vectors that are wider than those of the processor.
widths = st.sampled_from([4, 8, 16])
sparsities = st.sampled_from([0.0, 0.5, 0.9, 1.0])
seeds = st.integers(0, 2**16)
# The kernels compute all but the last, which is torch's.
ACTIVATIONS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.25),
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
}
activations = st.sampled_from(list(ACTIVATIONS))


@contextmanager
def vectors_of(width: int) -> Iterator[None]:
    """Compute with vectors of `width` floats."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (_call, _filters, _map_modules):
            patch.setattr(module, "engine", lambda: kernels(width))
        yield


def sparse(*shape: int, sparsity: float) -> Tensor:
    """A random weight of which about that share is zero."""
    return torch.randn(shape) * (torch.rand(shape) >= sparsity)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.numel():
        scale = max(float(expected.abs().max()), 0.01)  # all of it may be what cancelled out
        assert float((found - expected).abs().max()) <= TOLERANCE * scale


def assert_zero_around(y: Tensor) -> None:
    """Whether all of the map that `y` shows is zero but for the images."""
    found = held(y)
    assert found is not None
    rest = found.buffer.clone()
    rest.as_strided(found.layout.shape, found.layout.strides, found.layout.lead).zero_()
    assert not rest.any()
