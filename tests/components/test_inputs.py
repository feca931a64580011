"""Example inputs: the user's, or images made for the encoder in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awkward import Net
from finding import X, detected
from torch import Tensor, nn
from zoo.entry import TASKS, Heads

from torch_adapmtl import find_components
from torch_adapmtl.components.find import SHARED


def test_inputs_by_position_and_by_keyword() -> None:
    class Two(Net):
        def forward(self, x: Tensor, *, y: Tensor) -> Any:
            return super().forward(x + y)

    assert detected(Two(), {"x": X, "y": X}) == detected(Net(), (X,))


def test_timm_encoder_inside_wrappers_and_with_other_channels() -> None:
    timm = pytest.importorskip("timm")
    model = Heads(timm.create_model("resnet10t", num_classes=0, in_chans=5), 512)
    components = find_components(torch.compile(nn.DataParallel(model)))
    assert components.names == (SHARED, *TASKS)


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "tnt_s_patch16_224", "visformer_tiny"])
def test_the_size_a_timm_encoder_was_made_for_is_found(name: str) -> None:
    timm = pytest.importorskip("timm")  # they keep it in a stem, a pixel embedding, themselves
    encoder = timm.create_model(name, num_classes=0, img_size=64)
    model = Heads(encoder, encoder.head_hidden_size)
    assert SHARED in find_components(model)


def test_an_encoder_that_is_not_enough() -> None:
    timm = pytest.importorskip("timm")

    class Two(Heads):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return super().forward(x)

    model = Two(timm.create_model("resnet10t", num_classes=0), 512)
    match = r"images of 2x3x176x176, made for its encoder encoder \(ResNet\).*pass example_inputs="
    with pytest.raises(RuntimeError, match=match):
        find_components(model)


def test_images_leave_the_random_state_alone() -> None:
    timm = pytest.importorskip("timm")
    model = Heads(timm.create_model("resnet10t", num_classes=0), 512)
    state = torch.get_rng_state()
    find_components(model)
    assert torch.equal(torch.get_rng_state(), state)
