"""What a file of a sparse model holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch_adapmtl._tables import details, html_table, text_table

from ._index import StoredTensor, read_index
from ._safetensors import CODES, Reader

__all__ = ["SparseFile"]


@dataclass(frozen=True)
class SparseFile:
    """What a file of [save_sparse][torch_adapmtl.save_sparse] holds, and how large it is.

    It prints as a summary; in a notebook, it also shows the tensors.

    Attributes:
        path: The file.
        size: Its bytes.
        tensors: The tensors. Each has a `name`, a `shape`, the `dtype` that it is loaded as and the
            one of the `values` in the file, a `size` in the file, and the `error` that fewer bits
            made, as a share of the norm.
        tied: Pairs of a name that is not stored and the name of the tensor that it shares.

    Example:
        >>> import tempfile, torch
        >>> from torch_adapmtl import save_sparse
        >>> path = tempfile.mkdtemp() + "/eye.safetensors"
        >>> file = save_sparse({"eye": torch.eye(1000)}, path)
        >>> print(file.table())
        tensor  shape        type  values  zeros left out  bytes  of dense  error
        eye     1000 x 1000   F32     F32         99.90 %  ...
        >>> SparseFile.read(path).dense_size
        4000000
    """

    path: str
    size: int
    tensors: tuple[StoredTensor, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SparseFile:
        """Look at a file without loading it.

        Raises:
            SparseFileError: If the file was not written by `save_sparse`, is damaged or cut off.
            OSError: If the file cannot be read.
        """
        with open(path, "rb") as file:
            reader = Reader(file, os.fsdecode(path))
            index = read_index(reader)
        tied = [(name, x.name) for name, x in index.items() if name != x.name]
        own = tuple(x for name, x in index.items() if name == x.name)
        return cls(reader.name, reader.size, own, tuple(tied))

    @property
    def dense_size(self) -> int:
        """Bytes of all tensors as they are loaded."""
        return sum(x.dense_size for x in self.tensors)

    @property
    def error(self) -> float:
        """The largest error of a tensor that was saved in fewer bits."""
        return max((x.error for x in self.tensors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as dicts, lists, strings and numbers, which JSON can hold."""
        return {
            "size": self.size,
            "dense_size": self.dense_size,
            "error": self.error,
            "tensors": [
                {
                    "name": x.name,
                    "shape": list(x.shape),
                    "dtype": CODES[x.dtype],
                    "values": CODES[x.values],
                    "left_out": x.left_out,
                    "size": x.size,
                    "error": x.error,
                }
                for x in self.tensors
            ],
            "tied": dict(self.tied),
        }

    def table(self) -> str:
        """Return a table of the tensors."""
        return "\n".join(text_table(self._rows(), left=2))

    def __str__(self) -> str:
        share = 100 * self.size / self.dense_size if self.dense_size else 100
        lines = [
            f"{self.path}: {self.size / 1e6:,.3f} MB, {share:.1f} % of "
            f"{self.dense_size / 1e6:,.3f} MB dense"
        ]
        narrow = [x for x in self.tensors if x.error]
        if narrow:
            worst = max(narrow, key=lambda x: x.error)
            lines.append(
                f"tensors in fewer bits ({CODES[worst.values]}): {len(narrow)}; the largest error "
                f"is {100 * worst.error:.3g} % of the norm, of {worst.name}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return details(str(self), html_table(self._rows(), left=2))

    def _rows(self) -> list[list[str]]:
        rows = [
            ["tensor", "shape", "type", "values", "zeros left out", "bytes", "of dense", "error"]
        ]
        for x in self.tensors:
            share = f"{100 * x.size / x.dense_size:.1f} %" if x.dense_size else ""
            left_out = f"{100 * x.left_out / x.elements:.2f} %" if x.left_out else ""
            error = f"{100 * x.error:.3g} %" if x.error else ""
            shape, types = " x ".join(map(str, x.shape)), (CODES[x.dtype], CODES[x.values])
            name = x.name if x.name.isprintable() else repr(x.name)
            rows.append([name, shape, *types, left_out, f"{x.size:,}", share, error])
        return rows
