"""Sparsity against plain counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_adapmtl import sparsity


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

    layer = nn.Linear(4, 4, bias=False)
    prune.custom_from_mask(layer, "weight", torch.arange(16).reshape(4, 4) < 12)
    parametrize.register_parametrization(layer, "weight_orig", Halve())
    assert sparsity(layer) == 0.75


def test_measuring_leaves_grad_mode_and_model() -> None:
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity(model)
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
