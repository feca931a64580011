"""Problems on pairs of digits: two classes and a distance."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from examples.benchmark.problems.resnet import resnet18
from torch_adapmtl.datasets import MultiDigits
from torch_adapmtl.models import (
    ClassificationHead,
    MultiTaskModel,
    RegressionHead,
    feature_channels,
)
from torch_adapmtl.tasks import Classification, Regression

__all__ = ["digits_problems"]


def _resnet18() -> nn.Module:
    """Without the pooling: maps of one pixel would show a 3x3 convolution little but padding."""
    encoder = resnet18(16, 32, 64, 128, num_classes=0, in_chans=1)()
    encoder.maxpool = nn.Identity()
    return encoder


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    encoder: nn.Module = ConvNeXt(
        in_chans=1, num_classes=0, depths=(1, 1, 2, 1), dims=(24, 48, 96, 192), patch_size=2
    )
    return encoder


def _efficientnet() -> nn.Module:
    """Inverted residuals of depthwise convolutions with squeeze-and-excitation."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = [
        ["ds_r1_k3_s1_e1_c16_se0.25"],
        ["ir_r2_k3_s2_e4_c24_se0.25"],
        ["ir_r2_k5_s2_e4_c48_se0.25"],
        ["ir_r1_k3_s2_e4_c96_se0.25"],
    ]
    blocks = decode_arch_def(stages)  # type: ignore[no-untyped-call]
    encoder: nn.Module = EfficientNet(
        blocks, num_classes=0, num_features=192, in_chans=1, stem_size=16
    )
    return encoder


def _digits(name: str, make_encoder: Callable[[], nn.Module], *, steps: int, lr: float) -> Problem:
    def load() -> tuple[Samples, Samples]:
        train, test = (MultiDigits(split, image_size=32) for split in ("train", "test"))
        return Samples(*train.tensors()), Samples(*test.tensors())

    def make_model() -> nn.Module:
        encoder = make_encoder()
        width = feature_channels(encoder)
        last = {
            "left": ClassificationHead(128, 10),
            "right": ClassificationHead(128, 10),
            "distance": RegressionHead(128),
        }
        heads = {
            task: nn.Sequential(nn.Linear(width, 128), nn.ReLU(), head)
            for task, head in last.items()
        }
        return MultiTaskModel(encoder, heads)

    return Problem(
        name,
        load,
        make_model,
        lambda: {
            "left": Classification(10),
            "right": Classification(10),
            "distance": Regression(),
        },
        steps=steps,
        batch=32,
        lr=lr,
    )


def digits_problems() -> tuple[Problem, ...]:
    """The same tasks for a narrow ResNet-18, a small ConvNeXt and a small EfficientNet."""
    return (
        _digits("digits", _resnet18, steps=300, lr=2e-3),
        # With 2e-3 the dense ConvNeXt learns nothing from some seeds.
        _digits("digits convnext", _convnext, steps=300, lr=1e-3),
        _digits("digits efficientnet", _efficientnet, steps=300, lr=2e-3),
    )
