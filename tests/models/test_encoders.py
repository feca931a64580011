"""The paper's encoders: strides, dilations, sizes, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from torch_adapmtl.models import (
    ASPPHead,
    MultiTaskModel,
    dilated_mobilenet_v2,
    dilated_resnet34,
    feature_channels,
)

pytest.importorskip("timm")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_of_the_papers_resnet34_model() -> None:
    with torch.device("meta"):
        encoder = dilated_resnet34()
        heads = {"seg": ASPPHead(512, 40), "normal": ASPPHead(512, 3), "depth": ASPPHead(512, 1)}
    assert count(encoder) == 21_284_672  # ResNet34 without its classifier
    assert count(MultiTaskModel(encoder, heads)) == 90_695_664  # "90.7 M": 77 % in the heads


def test_dilated_resnet34_has_the_papers_strides_and_dilations() -> None:
    with torch.device("meta"):
        encoder = dilated_resnet34()
        (features,) = encoder(torch.empty(2, 3, 65, 65))
    assert features.shape == (2, 512, 9, 9)
    for stage, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], start=1):
        layer = encoder.get_submodule(f"layer{stage}")
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
        spatial = [m for m in convs if m.kernel_size == (3, 3)]
        assert spatial[0].stride == (stride, stride)
        assert all(m.stride == (1, 1) for m in spatial[1:])
        assert {m.dilation for m in spatial} == {m.padding for m in spatial} == {(dilation,) * 2}
        pointwise = [m for m in convs if m.kernel_size == (1, 1)]
        assert all(m.stride == (stride, stride) for m in pointwise)


def test_no_scale_of_a_norm_starts_at_0() -> None:
    norms = [m for m in dilated_resnet34().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 36
    assert all((norm.weight == 1).all() for norm in norms)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_dilated_mobilenet_v2_has_the_requested_stride(stride: int) -> None:
    encoder = dilated_mobilenet_v2(output_stride=stride).eval()
    with torch.no_grad():
        features = encoder(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 1280, 64 // stride, 64 // stride)
    assert count(encoder) == 2_223_872  # MobileNetV2 without its classifier
    assert feature_channels(encoder) == 1280


def test_images_may_have_other_channels() -> None:
    with torch.device("meta"):
        assert dilated_resnet34(in_chans=1)(torch.empty(2, 1, 32, 32))[0].shape[1] == 512
    with torch.no_grad():
        assert dilated_mobilenet_v2(4).eval()(torch.zeros(1, 4, 32, 32)).shape[1] == 1280


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        dilated_mobilenet_v2(output_stride=4)
    with pytest.raises(ValueError, match="in_chans must be"):
        dilated_resnet34(0)
    with pytest.raises(ValueError, match="Linear has no attribute with the number of its channels"):
        feature_channels(nn.Linear(1, 1))


def test_the_error_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[models\]"'):
        dilated_resnet34()
