"""The settings, the progress and the masks of a run as one tensor of bytes.

It is a tensor because averages of models, safetensors and other tools assume that every value of a
state dict is a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torch_adapmtl.layers.layer import shaped_like

__all__ = ["damaged", "pack", "unpack", "unpack_mask"]

# Bytes reserved for the progress.
_PROGRESS = 512


def pack(
    header: Mapping[str, Any],
    progress: Mapping[str, Any],
    masks: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> Tensor:
    """Write values that JSON can hold, and boolean masks, into a uint8 tensor on the CPU.

    Its length is constant during a run, also if masks are added, because averages of a model and
    distributed checkpoints copy one state into another.

    Args:
        header: The values that are constant during a run.
        progress: The values that change during a run; a few numbers.
        masks: The masks; None for a missing mask.
        sizes: The number of entries of each mask, present or missing.
    """
    text = json.dumps([header, list(sizes)]).encode()
    changing = json.dumps(progress).encode().ljust(_PROGRESS)
    if len(changing) > _PROGRESS:
        raise ValueError(f"progress takes {len(changing)} bytes of {_PROGRESS}: {progress}")
    bits = [
        torch.zeros(_bytes(size), dtype=torch.uint8) if mask is None else _packed(mask)
        for mask, size in zip(masks, sizes, strict=True)
    ]
    present = torch.tensor([mask is not None for mask in masks], dtype=torch.uint8)
    length = torch.tensor([len(text)]).view(torch.uint8)
    return torch.cat([length, _as_tensor(text), _as_tensor(changing), present, *bits])


def unpack(state: object) -> tuple[dict[str, Any], dict[str, Any], list[Tensor | None]]:
    """Read header, progress and masks from the result of `pack`; the masks stay packed.

    Raises:
        ValueError: If `state` is not a result of `pack`, or is damaged.
    """
    if not isinstance(state, Tensor):
        raise damaged(f"it is a {type(state).__name__}, not a tensor")
    if state.dtype != torch.uint8 or state.ndim != 1 or state.is_meta:
        raise damaged(
            f"it is a tensor of {state.dtype} and shape {tuple(state.shape)} on {state.device}, "
            f"not one of bytes"
        )
    state = state.cpu()
    try:
        start = 8 + int(state[:8].clone().view(torch.int64))
        if not 8 < start <= len(state):
            raise ValueError(f"{start} of them were to be its header")
        header, sizes = json.loads(bytes(state[8:start].tolist()))
        progress = json.loads(bytes(state[start : start + _PROGRESS].tolist()))
        lengths = [len(sizes), *map(_bytes, sizes)]
        present, *bits = state[start + _PROGRESS :].split(lengths)
        flags = present.tolist()
        masks = [part if flag else None for part, flag in zip(bits, flags, strict=True)]
        return {**header}, {**progress}, masks
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(f"its {len(state)} bytes cannot be read: {error}") from error


def damaged(reason: str) -> ValueError:
    """Make the error for a state that cannot be read."""
    return ValueError(
        f"the state dict's adapmtl._extra_state is damaged, or not of torch-adapmtl ({reason}); "
        f"load another checkpoint"
    )


def _as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _bytes(size: int) -> int:
    return -(-size // 8)


# A cache, because averages of a model read its state in every step and masks seldom change.
_PACKED = WeakTensorKeyDictionary()


def _packed(mask: Tensor) -> Tensor:
    cached: tuple[int, Tensor] | None = _PACKED.get(mask)
    if cached is None or cached[0] != mask._version:
        cached = mask._version, pack_mask(mask).cpu()
        _PACKED[mask] = cached
    return cached[1]


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bytes, eight entries in each, the first entry in the lowest bit."""
    flat = mask.flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (rows.to(torch.uint8) << _shifts(rows)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """Unpack bytes into a boolean mask with the shape and the device of `like`.

    Raises:
        ValueError: If the number of bytes does not match the shape.
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
