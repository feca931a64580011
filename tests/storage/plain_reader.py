"""The reader that the page on files shows, which needs numpy and the standard library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs/recipes/files.md"


def code() -> str:
    (found,) = (x for x in PAGE.read_text(encoding="utf-8").split("```") if "def decode" in x)
    return found.removeprefix("python\n")


def _reader() -> Callable[[str], dict[str, np.ndarray[Any, Any]]]:
    names: dict[str, Any] = {}
    exec(compile(code(), str(PAGE), "exec"), names)
    read: Callable[[str], dict[str, np.ndarray[Any, Any]]] = names["read_sparse"]
    return read


read_sparse = _reader()


def assert_same_bits(found: np.ndarray[Any, Any], expected: Tensor) -> None:
    """Numpy has no bfloat16 and no 8-bit floats."""
    assert found.shape == tuple(expected.shape)
    assert found.tobytes() == bits(expected).numpy().tobytes()


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
