"""The error of a file that cannot be loaded."""

from __future__ import annotations

__all__ = ["SparseFileError"]


class SparseFileError(ValueError):
    """A file is none of [save_sparse][torch_adapmtl.save_sparse], or was damaged.

    Example:
        >>> import tempfile
        >>> from torch_adapmtl import load_sparse
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     load_sparse(file.name)
        Traceback (most recent call last):
            ...
        torch_adapmtl...SparseFileError: ... it is no safetensors file, or was cut off
    """
