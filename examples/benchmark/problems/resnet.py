"""ResNet-18 in other widths, which the problems on rooms and on digits share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["resnet18"]


def resnet18(*channels: int, **options: Any) -> Callable[[], nn.Module]:
    """A ResNet-18 of timm with other widths of its stages."""

    def make() -> nn.Module:
        import timm

        # Without zeros: SNIP and DiSparse look at gradients before the first step, and behind a
        # norm that starts at zero there are none.
        encoder: nn.Module = timm.create_model(
            "resnet18", pretrained=False, zero_init_last=False, channels=channels, **options
        )
        return encoder

    return make
