"""The part of the state that is not in tensors by itself, as one tensor of bytes.

A tensor, because much that is done with a state dict (averaging it, writing it to safetensors,
comparing it) takes every value for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "pack_mask", "shaped_like", "unpack", "unpack_mask"]


def pack(header: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Tensor:
    """Write what JSON can hold, and boolean masks by name, into a uint8 tensor on the CPU."""
    bits = {name: pack_mask(mask).cpu() for name, mask in masks.items()}
    sizes = {name: len(packed) for name, packed in bits.items()}
    text = json.dumps([header, sizes]).encode()
    length = torch.tensor([len(text)]).view(torch.uint8)
    return torch.cat([length, torch.tensor(list(text), dtype=torch.uint8), *bits.values()])


def unpack(state: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `pack` wrote; the masks come as packed bytes."""
    state = state.cpu()
    end = 8 + int(state[:8].clone().view(torch.int64))
    header, sizes = json.loads(bytes(state[8:end].tolist()))
    return header, dict(zip(sizes, state[end:].split(list(sizes.values())), strict=True))


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
