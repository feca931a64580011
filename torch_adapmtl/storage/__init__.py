"""Small files of sparse models."""

from __future__ import annotations

from torch_adapmtl.storage._index import StoredTensor
from torch_adapmtl.storage.error import SparseFileError
from torch_adapmtl.storage.file import SparseFile
from torch_adapmtl.storage.load import load_sparse
from torch_adapmtl.storage.save import save_sparse

__all__ = ["SparseFile", "SparseFileError", "StoredTensor", "load_sparse", "save_sparse"]
