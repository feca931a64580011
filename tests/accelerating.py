"""Models with zeros, and the same accelerated: every layer sparse, whatever that costs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_adapmtl.inference import AcceleratedModel, accelerate

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
TOLERANCE = 1e-5  # of the largest output


def pruned(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """The model for evaluation, with zeros in its layers and batch norms that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LAYERS):
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)
    return model.eval()


def all_sparse(model: nn.Module, inputs: Any) -> AcceleratedModel:
    """The model accelerated; each layer that can skip its zeros does, and nothing is decided."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("torch_adapmtl.inference.accelerated")
        forced = lambda _, layers: {layer.name: "sparse" for layer in layers}  # noqa: E731
        patch.setattr(module, "checked", forced)
        result = accelerate(model, inputs)
    assert {*result.choices.values()} <= {"sparse"}
    return result


def assert_same(
    found: Iterable[Tensor], expected: Iterable[Tensor], largest: float | None = None
) -> None:
    """Whether outputs are equal up to rounding: of the largest number of each, if none is given."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.isfinite().all() == b.isfinite().all()
        if b.numel():
            scale = float(b.abs().max()) if largest is None else largest
            assert float((a.double() - b.double()).abs().max()) <= TOLERANCE * scale
