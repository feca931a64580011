"""The nonzeros of a layer, in the order in which the kernels want them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._call import engine, fields
from ._kernels.convolve import FIRST, LAST, MOST_VECTORS
from ._maps import Map

ROWS = 400 * 1024  # bytes of output that a block of filters has in a strip
# Nonzeros in a task, on average: one of few does not pay for its beginning and its end.
FEWEST = 4
SHARES = 4  # pieces of work for each thread, so that the threads end together


@functools.cache
def first_cache() -> int:
    """Bytes of the first data cache; 32 KiB where the system does not say."""
    try:
        return max(os.sysconf("SC_LEVEL1_DCACHE_SIZE"), 32 * 1024)
    except (AttributeError, ValueError, OSError):
        return 32 * 1024


@dataclass(frozen=True)
class Order:
    """Nonzeros sorted by block of rows, block of columns, row; and the tasks that they make."""

    nonzeros: Tensor  # column, down, right, bits of the value
    tasks: Tensor  # row, first nonzero, end, flags
    groups: Tensor  # first task of each block of rows


def order(filters: Filters, row_block: int, column_block: int) -> Order:
    """Sort by blocks; a row without nonzeros gets one empty task, which writes its bias."""
    rows, columns = len(filters.bias), filters.columns
    row, column = filters.row.long(), filters.column.long()
    column_blocks, row_blocks = -(-columns // column_block), -(-rows // row_block)
    key = (
        (row // row_block) * column_blocks + column // column_block
    ) * row_block + row % row_block
    shape = (row_blocks, column_blocks, row_block)
    counts = torch.bincount(key, minlength=row_blocks * column_blocks * row_block).view(shape)
    ends = counts.flatten().cumsum(0).view(shape)
    numbers = (
        torch.arange(row_blocks * row_block, device="cpu")
        .view(row_blocks, 1, row_block)
        .expand(shape)
    )
    some = counts > 0
    some[:, 0] |= ~some.any(1) & (numbers[:, 0] < rows)
    so_far = some.int().cumsum(1)
    flags = FIRST * (so_far == 1) + LAST * (so_far == so_far[:, -1:])
    tasks = torch.stack([numbers, ends - counts, ends, flags], -1)[some].int()
    groups = torch.zeros(row_blocks + 1, dtype=torch.int32, device="cpu")
    groups[1:] = some.sum((1, 2)).cumsum(0)
    bits = filters.value.view(torch.int32)
    nonzeros = torch.stack([filters.column, filters.down, filters.right, bits])
    return Order(nonzeros[:, key.sort(stable=True).indices], tasks, groups)


class Filters:
    """The nonzeros of a matrix of filters.

    A row is an output channel, a column an input channel or a phase of one.

    Args:
        row, column, down, right, value: For each nonzero: at every position, ``out[row]`` gets
            ``value`` times ``in[column]``, `down` rows below and `right` columns to the right.
        bias: One number for each row.
        columns: Number of input columns.
    """

    def __init__(
        self,
        row: Tensor,
        column: Tensor,
        down: Tensor,
        right: Tensor,
        value: Tensor,
        bias: Tensor,
        columns: int,
    ) -> None:
        self.row, self.column, self.value, self.bias = (
            row.int(),
            column.int(),
            value.contiguous(),
            bias.contiguous(),
        )
        self.down, self.right, self.columns = down.int(), right.int(), columns
        self.reach = tuple(
            (max(0, -int(t.min())), max(0, int(t.max()))) if t.numel() else (0, 0)
            for t in (self.down, self.right)
        )
        self._orders: dict[tuple[int, int, int], Order] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}

    def __len__(self) -> int:
        return len(self.value)

    def _most_vectors(self, width: int) -> int:
        """Longest strip: short ones leave room in the first cache for more channels.

        A window of several rows gains more from long strips, in which its rows overlap.
        """
        return MOST_VECTORS[width] if sum(self.reach[0]) else min(MOST_VECTORS[width], 128 // width)

    def _order(self, vectors: int, width: int, blocks: int) -> Order:
        """Blocks for strips of up to 4, 8 or 16 vectors, so that sizes of maps share them."""
        vectors = next(n for n in (4, 8, MOST_VECTORS[width]) if vectors <= n)
        key = (vectors, width, blocks)
        if key not in self._orders:
            strip = vectors * width * 4
            heights = 1 + sum(self.reach[0])  # rows of the map that a filter reads
            rows, columns = len(self.bias), self.columns
            per_task = len(self) / max(1, rows * columns)
            column_block = max(
                first_cache() // (strip * (1 + heights) // 2), int(FEWEST / max(per_task, 1e-9)), 1
            )
            column_block = -(-columns // -(-columns // column_block))
            row_block = max(1, min(ROWS // strip, -(-rows // blocks)))
            self._orders[key] = order(self, row_block, column_block)
        return self._orders[key]

    def call(
        self, source: Map, output: Map, activation: tuple[int, float, float]
    ) -> tuple[Any, list[Tensor]]:
        """The fields of a call but those of input and output, and the tensors they point to."""
        kernels, keep = engine(), output.keep
        vectors = output.pitch // kernels.width
        strips = -(-vectors // self._most_vectors(kernels.width))
        threads = torch.get_num_threads()
        blocks = 1 if threads == 1 else -(-SHARES * threads // strips)
        chosen = self._order(-(-vectors // strips), kernels.width, blocks)
        column, down, right, value = chosen.nonzeros
        pairs = torch.empty(len(value), 2, dtype=torch.int32, device="cpu")
        offset = torch.mul(column, source.pitch).add_(down, alpha=source.columns)
        torch.add(offset, right, out=pairs[:, 0])
        pairs[:, 1] = value
        kind, low, high = activation
        low_bits, high_bits = (
            torch.tensor([low, high], dtype=torch.float32, device="cpu").view(torch.int32).tolist()
        )
        call = fields(
            work=kernels.works["convolve"],
            parallel=kernels.parallel,
            lead_bytes=4 * output.lead,
            tail_bytes=4 * output.lead,
            pitch=output.pitch,
            bias=self.bias.data_ptr(),
            keep=0 if keep is None else keep.data_ptr(),
            nonzeros=pairs.data_ptr(),
            tasks=chosen.tasks.data_ptr(),
            groups=chosen.groups.data_ptr(),
            group_count=len(chosen.groups) - 1,
            strip_count=strips,
            vectors=vectors // strips,
            longer=vectors % strips,
            activation=kind,
            low=low_bits,
            high=high_bits,
        )
        alive = [pairs, chosen.tasks, chosen.groups, self.bias]
        return call, alive if keep is None else [*alive, keep]
