"""Masks as bits, one a weight, for the state dict."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_mask", "shaped_like", "unpack_mask"]


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bytes, eight entries each, the first in the lowest bit."""
    flat = mask.flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (rows.to(torch.uint8) << _shifts(rows)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """Unpack bytes into a boolean mask in the shape and on the device of `like`.

    Raises:
        ValueError: If the number of bytes does not fit.
    """
    if len(packed) != -(-like.numel() // 8):
        raise ValueError(
            f"a packed mask of {len(packed)} bytes does not fit a weight of shape "
            f"{tuple(like.shape)}: the state dict comes from another model"
        )
    packed = packed.to(like.device)
    bits = (packed.unsqueeze(1) >> _shifts(packed)) & 1
    return shaped_like(like, bits.flatten()[: like.numel()].bool())


def shaped_like(weight: Tensor, mask: Tensor) -> Tensor:
    """Bring a flat mask into the shape and the memory format of `weight`."""
    # Of another format, it would pass that on to the weight and so to the convolution.
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.view(weight.shape))


def _shifts(tensor: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=tensor.device)
