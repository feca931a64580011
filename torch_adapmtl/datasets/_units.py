"""Depths and normals read from files: what is unknown, and whether the rest has the right unit.

A unit is wrong for a whole map, so a map is refused only if most of it contradicts the unit. Single
far depths, glitches and unknown pixels pass.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["decoded_normals", "metres", "unit_normals"]

_NO_DEPTH = 3e-5  # metres; depths up to here are unknown
# Metres beyond which at most half of the known depths lie: rooms have at most ten or so. Half of a
# map in millimetres, or centimetres, is beyond.
_FAR = 50.0
_NEAR = 10.0  # whole numbers beyond this are codes
_NO_NORMAL = 1e-3  # vectors up to this length are unknown
# By how much a length may differ from 1, in float arrays and in 8-bit codes (1 % by rounding, more
# by compression).
_OFF, _OFF_CODED = 0.02, 0.25


def metres(depth: Tensor, path: Path) -> Tensor:
    """Return the depths of a file in metres, 0 where unknown.

    Raises:
        ValueError: If most of the known depths are too large for metres, or all are whole numbers.
    """
    known = (depth > _NO_DEPTH) & depth.isfinite()
    values = depth[known]
    if len(values):
        low, high = (value.item() for value in values.aminmax())
        whole = low < high > _NEAR and bool((values % 1 == 0).all())
        if whole or 2 * int((values > _FAR).sum()) > len(values):
            raise ValueError(
                f"{path} must hold depths in metres, found {'whole numbers from ' * whole}{low:g} "
                f"to {high:g}; divide millimetres by 1000, and turn codes into metres"
            )
    return torch.where(known, depth, 0.0)


def unit_normals(vectors: Tensor, path: Path) -> Tensor:
    """Return the normals of a file, `(3, H, W)`, as vectors of length 1; 0 where unknown.

    Raises:
        ValueError: If no component is negative and most vectors are not of unit length, as of codes
            from 0 to 1 or to 255. They would become other directions.
    """
    lengths = vectors.square().sum(0).sqrt()
    known = (lengths > _NO_NORMAL) & lengths.isfinite()
    # Not a product with `known`: NaN * 0 is NaN.
    normals = torch.where(known, vectors / lengths, 0.0)
    if bool((normals.min() > -_OFF) & known.any()) and _most(known, lengths, _OFF):
        low, high = (value.item() for value in vectors[:, known].aminmax())
        remedy = "2 * code - 1" if high <= 1 else "code / 127.5 - 1"
        raise ValueError(
            f"{path} must hold normals of unit length, numbers from -1 to 1, found {low:g} to "
            f"{high:g}; decode them by {remedy}"
        )
    return normals


def decoded_normals(codes: Tensor, path: Path) -> Tensor:
    """Return the normals of 8-bit codes, `(3, H, W)`, as vectors of length 1; 0 where unknown.

    Unknown is what stands for no direction: 0, 255 or the middle (127 or 128) in all channels.

    Raises:
        ValueError: If most of the other codes do not stand for unit vectors.
    """
    vectors = codes / 127.5 - 1
    lengths = vectors.square().sum(0).sqrt()
    low, high = codes.amin(0), codes.amax(0)
    known = (low < 255) & (high > 0) & ((low < 127) | (high > 128))
    if _most(known, lengths, _OFF_CODED):
        raise ValueError(
            f"{path} must hold normals of unit length as 8-bit codes, found codes from "
            f"{low[known].min()} to {high[known].max()} for lengths of "
            f"{lengths[known].min():.2g} to {lengths[known].max():.2g}; save normals as "
            f"(normal + 1) * 127.5"
        )
    return torch.where(known, vectors / lengths, 0.0)


def _most(known: Tensor, lengths: Tensor, tolerance: float) -> bool:
    """Whether most of the known vectors are not of unit length."""
    off = known & ((lengths - 1).abs() > tolerance)
    return 2 * int(off.sum()) > int(known.sum())
