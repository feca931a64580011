"""How the kernels lay out activations, and the tensors that show them.

A *map* holds a batch of images channel by channel. The images of a channel lie one after the other,
each of ``rows x columns`` positions, of which the first ``height x width`` are the image and the
rest is zero: the padding to the right of one row is the padding to the left of the next, and so it
is for images. Before the first channel and after the last one lie ``lead`` zeros. Convolutions of
stride 1 read and write maps of one layout without a copy.

For a linear layer the positions are the tokens: one row without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ._record import STATE, unrecorded

MOST_FLOATS = 2**31  # in a map, whose places kernels know as 32-bit integers
ALIGN = 16  # floats in the widest vector: every channel begins at a multiple of it


class Maker(Protocol):
    """Makes maps, and can leave room in them."""

    def ask(self, rows: int, columns: int) -> None:
        """Leave so many rows and columns of zeros around each image from now on."""


class LeavesRoom:
    """A maker that leaves as much room around its images as any reader has asked for."""

    margin: tuple[int, int] = (0, 0)  # rows and columns

    def ask(self, rows: int, columns: int) -> None:
        """Leave so many rows and columns of zeros around each image from now on."""
        self.margin = (max(rows, self.margin[0]), max(columns, self.margin[1]))


@dataclass(frozen=True)
class Map:
    """The layout of a map."""

    batch: int
    channels: int
    height: int
    width: int
    rows: int
    columns: int
    lead: int = 0

    @cached_property
    def positions(self) -> int:
        return self.batch * self.rows * self.columns

    @cached_property
    def pitch(self) -> int:
        """Floats from one channel to the next."""
        return round_up(self.positions)

    @cached_property
    def size(self) -> int:
        """Floats in all, with the zeros before and after."""
        return 2 * self.lead + self.channels * self.pitch

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, self.height, self.width)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return (self.rows * self.columns, self.pitch, self.columns, 1)

    @cached_property
    @unrecorded
    def keep(self) -> Tensor | None:
        """All bits set where a position belongs to an image; None if all positions do."""
        if self.height * self.width * self.batch == self.pitch:
            return None
        mask = torch.zeros(self.pitch, dtype=torch.int32, device="cpu")
        images = mask[: self.positions].view(self.batch, self.rows, self.columns)
        images[:, : self.height, : self.width] = -1
        return mask


def floats(*shape: int) -> Tensor:
    """Memory for the kernels, whatever torch's default device and dtype are."""
    if STATE.recording is not None:
        return STATE.recording.floats(shape)
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def round_up(n: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-n // ALIGN) * ALIGN


def padded(
    batch: int, channels: int, height: int, width: int, rows: int, columns: int, reach: int = 0
) -> Map:
    """A map with room before and after for kernels that read a few rows (or `reach`) outside."""
    outside = max(rows - height, 2) * columns + max(columns - width, 2)
    return Map(batch, channels, height, width, rows, columns, round_up(max(outside, reach)))


class Held:
    """What a tensor that shows a map carries: the layout, the memory, and who made it."""

    __slots__ = ("address", "buffer", "layout", "maker", "shape", "strides")

    def __init__(self, layout: Map, buffer: Tensor, view: Tensor, maker: Maker | None) -> None:
        self.layout, self.buffer, self.maker = layout, buffer, maker
        self.address, self.shape, self.strides = view.data_ptr(), view.shape, view.stride()

    @property
    def body(self) -> Tensor:
        """The channels, without the zeros before and after."""
        return self.buffer[self.layout.lead : self.layout.size - self.layout.lead]


def show(
    layout: Map, buffer: Tensor, shape: Sequence[int], strides: Sequence[int], maker: Maker | None
) -> Tensor:
    """The tensor that a map holds, as a view of its memory."""
    view = buffer.as_strided(shape, strides, layout.lead)
    view._sparse_map = Held(layout, buffer, view, maker)  # type: ignore[attr-defined]
    return view


def held(x: Tensor) -> Held | None:
    """The map that `x` shows; None if it shows none, or none any more (after `resize_`, `t_`)."""
    found: Held | None = getattr(x, "_sparse_map", None)
    if found is None or x.data_ptr() != found.address:
        return None
    return found if x.shape == found.shape and x.stride() == found.strides else None


def contiguous(x: Any) -> Any:
    """What `x` is, but a tensor that shows a map without the gaps: as torch would have made it."""
    return x.contiguous() if isinstance(x, Tensor) and held(x) is not None else x
