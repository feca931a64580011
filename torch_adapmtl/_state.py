"""The part of the handle's state that is not in tensors by itself, as one tensor of bytes.

A tensor, because much that is done with a state dict (averaging it, writing it to safetensors,
comparing it) takes every value for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._layers import Layer, shaped_like

__all__ = ["load", "pack", "pack_mask", "save", "unpack", "unpack_mask"]

_VERSION = 1
# Room for what changes in the course of a run, in bytes.
_PROGRESS = 256


def save(
    settings: Mapping[str, Any], progress: Mapping[str, Any], layers: Sequence[Layer]
) -> Tensor:
    """Write a run's settings, how far it has come, and its masks."""
    header = {"version": _VERSION, **settings, "layers": _names(layers)}
    return pack(
        header,
        progress,
        [layer.threshold.mask for layer in layers],
        [layer.weight.numel() for layer in layers],
    )


def load(state: Tensor, settings: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """Load what `save` wrote: put the masks on the layers, return how far the run had come.

    Raises:
        ValueError: If it comes from another version or a run with other settings or layers; no
            mask has been changed then.
    """
    header, progress, packed = unpack(state)
    if header["version"] != _VERSION:
        raise ValueError(
            f"the state dict's adapmtl state has version {header['version']!r}, this "
            f"version of torch-adapmtl reads {_VERSION}"
        )
    for name, value in settings.items():
        if header[name] != value:
            raise ValueError(
                f"the state dict comes from a run with {name}={header[name]}, this model was "
                f"prepared with {name}={value}: prepare it alike"
            )
    if header["layers"] != _names(layers):
        differing = dict(sorted(header["layers"].items() ^ _names(layers).items()))
        raise ValueError(
            f"the state dict comes from a model in which other tensors were pruned, or in "
            f"other components; they differ in {differing}: prepare the model alike (groups, "
            f"prunable, exclude)"
        )
    masks = [
        None if bits is None else unpack_mask(bits, layer.weight)
        for layer, bits in zip(layers, packed, strict=True)
    ]
    for layer, mask in zip(layers, masks, strict=True):
        layer.threshold.mask = mask
    return progress


def _names(layers: Sequence[Layer]) -> dict[str, str]:
    return {layer.name: layer.component for layer in layers}


def pack(
    header: Mapping[str, Any],
    progress: Mapping[str, Any],
    masks: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> Tensor:
    """Write what JSON can hold, and boolean masks, into a uint8 tensor on the CPU.

    Its length is the same throughout a run, masks or not, because states are copied into each
    other: by averages of a model, by distributed checkpoints.

    Args:
        header: What does not change in the course of a run.
        progress: What does; a few numbers.
        masks: The masks; None where there is none.
        sizes: How many entries each of them has, or would have.
    """
    text = json.dumps([header, list(sizes)]).encode()
    changing = json.dumps(progress).encode().ljust(_PROGRESS)
    if len(changing) > _PROGRESS:
        raise ValueError(f"progress takes {len(changing)} bytes of {_PROGRESS}: {progress}")
    bits = [
        torch.zeros(_bytes(size), dtype=torch.uint8) if mask is None else pack_mask(mask).cpu()
        for mask, size in zip(masks, sizes, strict=True)
    ]
    present = torch.tensor([mask is not None for mask in masks], dtype=torch.uint8)
    length = torch.tensor([len(text)]).view(torch.uint8)
    return torch.cat([length, _as_tensor(text), _as_tensor(changing), present, *bits])


def unpack(state: Tensor) -> tuple[dict[str, Any], dict[str, Any], list[Tensor | None]]:
    """Read what `pack` wrote; the masks come as packed bytes."""
    state = state.cpu()
    start = 8 + int(state[:8].clone().view(torch.int64))
    header, sizes = json.loads(bytes(state[8:start].tolist()))
    progress = json.loads(bytes(state[start : start + _PROGRESS].tolist()))
    lengths = [len(sizes), *map(_bytes, sizes)]
    present, *bits = state[start + _PROGRESS :].split(lengths)
    masks = [part if there else None for part, there in zip(bits, present.tolist(), strict=True)]
    return header, progress, masks


def _as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _bytes(size: int) -> int:
    return -(-size // 8)


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
    if len(packed) != _bytes(like.numel()):
        raise ValueError(
            f"a packed mask of {len(packed)} bytes does not fit a weight of shape "
            f"{tuple(like.shape)}: the state dict comes from another model"
        )
    packed = packed.to(like.device)
    bits = (packed.unsqueeze(1) >> _shifts(packed)) & 1
    return shaped_like(like, bits.flatten()[: like.numel()].bool())


def _shifts(tensor: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=tensor.device)
