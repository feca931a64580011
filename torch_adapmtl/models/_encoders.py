"""The paper's two encoders, built on timm, and the channels of any timm or SMP encoder."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import nn

__all__ = ["dilated_mobilenet_v2", "dilated_resnet34", "feature_channels"]


def dilated_resnet34(in_chans: int = 3) -> nn.Module:
    """The paper's ResNet34 encoder: stage strides 1, 2, 1, 1 and dilations 1, 1, 2, 4.

    With the stem the output stride is 8; the output is one map of 512 channels. Every 3x3
    convolution of a stage has the stage's dilation. Weights are random; nothing is downloaded. The
    weights of normalization layers start at 1, also where timm starts them at 0, because no
    gradient would reach the layers before them in the first step.

    Args:
        in_chans: Channels of the images.

    Returns:
        A timm feature extractor that returns a list of one tensor.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If `in_chans` is below 1.

    Example:
        >>> import torch
        >>> [f.shape for f in dilated_resnet34()(torch.zeros(1, 3, 32, 32))]
        [torch.Size([1, 512, 4, 4])]
    """
    _check_channels(in_chans)
    encoder: nn.Module = _timm().create_model(
        "resnet34",
        pretrained=False,
        zero_init_last=False,
        features_only=True,
        out_indices=(4,),
        output_stride=8,
        in_chans=in_chans,
    )
    # timm gives the first convolution of a stage the dilation of the previous stage.
    for stage, dilation in (("layer3", 2), ("layer4", 4)):
        for module in encoder.get_submodule(stage).modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
    return encoder


def dilated_mobilenet_v2(in_chans: int = 3, *, output_stride: int = 8) -> nn.Module:
    """The paper's MobileNetV2 encoder, up to its last 1x1 convolution (1,280 channels).

    Stages that would exceed `output_stride` are dilated instead of strided. Weights are
    random; nothing is downloaded.

    Args:
        in_chans: Channels of the images.
        output_stride: Size of the image divided by the size of the map: 8, 16 or 32 (32 is the
            original network, without dilation).

    Returns:
        A timm model that returns one map `(B, 1280, h, w)`.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If `in_chans` is below 1 or `output_stride` is not 8, 16 or 32.

    Example:
        >>> import torch
        >>> dilated_mobilenet_v2()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 1280, 4, 4])
    """
    _check_channels(in_chans)
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
    encoder: nn.Module = _timm().create_model(
        "mobilenetv2_100",
        pretrained=False,
        num_classes=0,
        global_pool="",
        output_stride=output_stride,
        in_chans=in_chans,
    )
    return encoder


def feature_channels(encoder: nn.Module, feature: int = -1) -> int:
    """The number of channels of a feature map of a timm or SMP encoder.

    Args:
        encoder: A timm model (`features_only=True` or `num_classes=0`) or an SMP encoder.
        feature: Index of the feature map if there are several, as in `MultiTaskModel`; the last by
            default.

    Raises:
        ValueError: If the encoder has no attribute with this number.

    Example:
        >>> feature_channels(dilated_resnet34())
        512
    """
    info = getattr(encoder, "feature_info", None)
    channels = getattr(info, "channels", None)
    if callable(channels):  # features_only
        return int(channels()[feature])
    # Where timm's head has a hidden layer, `num_features` is not the number of pooled features.
    for name in ("head_hidden_size", "num_features", "out_channels"):
        width = getattr(encoder, name, None)
        if isinstance(width, Sequence) and width:
            width = width[feature]
        if isinstance(width, int):
            return width
    raise ValueError(
        f"encoder {type(encoder).__name__} has no attribute with the number of its channels; pass "
        "that number to the head"
    )


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            'this encoder needs timm; install it with pip install "torch-adapmtl[models]"'
        ) from error
    module: ModuleType = timm
    return module


def _check_channels(in_chans: int) -> None:
    if in_chans < 1:
        raise ValueError(f"in_chans must be an integer >= 1, got {in_chans!r}")
