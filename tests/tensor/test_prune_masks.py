"""Masks that `torch.nn.utils.prune` put on a tensor before the soft threshold came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thresholding import COPIERS, Copier, original, put, threshold_of
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_adapmtl import SoftThresholdPruning, soft_threshold


def linear() -> nn.Linear:
    return nn.Linear(6, 4)


EARLIER: dict[str, Callable[[nn.Module, str], object]] = {
    "custom_from_mask": lambda m, n: prune.custom_from_mask(
        m, n, (torch.arange(getattr(m, n).numel()) % 3 > 0).view_as(getattr(m, n))
    ),
    "l1": lambda m, n: prune.l1_unstructured(m, n, 0.4),
    "structured": lambda m, n: prune.ln_structured(m, n, 0.5, n=1, dim=1),
    "container": lambda m, n: (
        prune.random_unstructured(m, n, 0.3),
        prune.ln_structured(m, n, 0.3, n=2, dim=0),
    ),
    "ours, globally": lambda m, n: prune.global_unstructured(
        [(m, n)], SoftThresholdPruning, threshold=0.2
    ),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (linear, "weight", (3, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "weight", (1, 2, 3, 3, 3)),
    "lstm": (lambda: nn.LSTM(4, 3), "weight_hh_l0", (5, 2, 4)),
}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("copier", [lambda m: m, *COPIERS])
def test_an_earlier_mask_survives(
    earlier: str, kind: str, straight_through: bool, copier: Copier
) -> None:
    make, name, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    EARLIER[earlier](layer, name)
    layer(x)
    masked = getattr(layer, name + "_mask") == 0
    parameter = getattr(layer, name + "_orig")
    want = soft_threshold(getattr(layer, name).detach(), 0.05)
    put(layer, name, 0.05)
    assert original(layer, name) is parameter
    assert torch.equal(getattr(layer, name), want)
    assert len(layer._forward_pre_hooks) == 1
    layer = copier(layer)
    threshold_of(layer, name).straight_through = straight_through
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.1)
    start = original(layer, name).detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        first(layer(x)).square().sum().backward()
        assert not original(layer, name).grad[masked].any()
        optimiser.step()
        assert not getattr(layer, name)[masked].any()
    assert not torch.equal(getattr(layer, name)[~masked], start[~masked])
    before = first(layer(x))
    prune.remove(layer, name)
    assert torch.equal(first(layer(x)), before)
    assert not layer.get_parameter(name)[masked].any()
    assert sorted(layer.state_dict()) == sorted(make().state_dict())


def test_masked_state_dict_round_trip() -> None:
    first_layer, second = linear(), linear()
    for seed, layer in enumerate((first_layer, second)):
        torch.manual_seed(seed)
        prune.random_unstructured(layer, "weight", 0.5)
        put(layer, "weight", 0.1)
    assert not torch.equal(threshold_of(first_layer).mask, threshold_of(second).mask)
    second.load_state_dict(first_layer.state_dict())
    assert torch.equal(second.weight, first_layer.weight)
