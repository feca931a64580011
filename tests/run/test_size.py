"""Sparsity and size against plain counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from html_tables import tables_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_adapmtl import size, sparsity


class Halve(nn.Module):
    """Zeroes the first half of a tensor's elements."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.numel()).reshape(x.shape) >= x.numel() // 2
        return x * keep


def test_sparsity_of_tensors() -> None:
    x = torch.tensor([0.0, -0.0, math.nan, 1e-30])
    assert sparsity(x) == 0.5
    assert sparsity([x, torch.zeros(2, 2)]) == 0.75
    assert sparsity([x, x]) == 0.5
    assert sparsity(t for t in [torch.zeros(1), torch.ones(3)]) == 0.25


def test_sparsity_of_a_model_counts_prunable_weights_only() -> None:
    model = nn.ModuleList(
        [
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ConvTranspose1d(2, 2, 2),
            nn.Embedding(5, 2),
            nn.LSTM(2, 2),
            nn.MultiheadAttention(4, 2),
            nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
        ]
    )
    prunable = [
        model[0].weight,
        model[2].weight,
        model[5].in_proj_weight,
        model[5].out_proj.weight,
        model[6].q_proj_weight,
        model[6].k_proj_weight,
        model[6].v_proj_weight,
        model[6].out_proj.weight,
    ]
    ids = {id(weight) for weight in prunable}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in ids:
                parameter.zero_()
        assert sparsity(model) == 0
        prunable[3].zero_()
    assert sparsity(model) == prunable[3].numel() / sum(w.numel() for w in prunable)


def test_tied_weights_count_once_whoever_comes_first() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    assert sparsity(model) == 0.5
    assert size(model).parameters == 12 + 4 + 12 + 4


def test_weights_count_as_the_forward_pass_uses_them() -> None:
    layer = nn.Linear(4, 4, bias=False)
    prune.random_unstructured(layer, "weight", amount=4)
    assert sparsity(layer) == 0.25
    with torch.no_grad():
        layer.weight_orig.fill_(0)  # without a forward: the plain attribute is stale
    assert sparsity(layer) == 1

    layer = nn.Linear(4, 4, bias=False)
    parametrize.register_parametrization(layer, "weight", Halve())
    assert sparsity(layer) == 0.5
    assert size(layer).zeros == 8
    assert size(layer).parameters == 16

    layer = nn.Linear(4, 4, bias=False)
    prune.custom_from_mask(layer, "weight", torch.arange(16).reshape(4, 4) < 12)
    parametrize.register_parametrization(layer, "weight_orig", Halve())
    assert sparsity(layer) == 0.75
    assert size(layer).parameters == 16


def test_measuring_leaves_grad_mode_and_model() -> None:
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity(model)
    size(model)
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_size_against_real_storage(shape: list[int], density: float, dtype: torch.dtype) -> None:
    values = (torch.rand(shape) + 0.5) * (torch.rand(shape) < density)
    model = nn.Module()
    model.weight = nn.Parameter(values.to(dtype))
    found = size(model)
    flat = model.weight.detach().flatten()
    kept = flat[flat != 0]
    assert found.parameters == flat.numel()
    assert found.zeros == flat.numel() - kept.numel()
    assert found.dense_bytes == flat.numel() * flat.element_size()
    bits = math.ceil(flat.numel() / 8)
    assert found.bitmap_bytes == min(found.dense_bytes, bits + kept.nbytes)
    matrix = flat.reshape(shape[0] if len(shape) > 1 else 1, -1) if flat.numel() else None
    if matrix is None:
        assert found.csr_bytes == 0
        return
    rows = torch.arange(matrix.shape[0] + 1, dtype=torch.int32)
    columns = (matrix != 0).nonzero()[:, 1].int()
    assert found.csr_bytes == min(found.dense_bytes, kept.nbytes + columns.nbytes + rows.nbytes)


def test_size_reads_well() -> None:
    text = str(size(nn.Linear(1000, 1000)))
    assert text.startswith("1,001,000 parameters, 0.00 % zero: 4.004 MB dense, 4.004 MB as bitmap")
    assert size(nn.ReLU()).sparsity == 0


def test_html_of_a_size() -> None:
    layer = nn.Linear(500, 500, bias=False)
    nn.init.eye_(layer.weight)
    (table,) = tables_of(size(layer))
    assert table == [
        ["format", "size", "of dense"],
        ["dense", "1.000 MB", "100.0 %"],
        ["bitmap and values", "0.033 MB", "3.3 %"],
        ["CSR", "0.006 MB", "0.6 %"],
    ]
    assert "250,000 parameters, 99.80 % zero" in size(layer)._repr_html_()
    assert tables_of(size(nn.ReLU()))[0][1] == ["dense", "0.000 MB", ""]


@pytest.mark.parametrize("nothing", [nn.ReLU(), [], torch.empty(0)])
def test_sparsity_of_nothing(nothing: Any) -> None:
    with pytest.raises(ValueError, match="no weight to count"):
        sparsity(nothing)


def test_sparsity_of_a_state_dict() -> None:
    with pytest.raises(TypeError, match=r"got 'weight' among them; .*\.values\(\)"):
        sparsity(nn.Linear(2, 2).state_dict())
