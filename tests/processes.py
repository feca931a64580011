"""Processes that start fast: from one that has imported what takes the time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_METHODS = torch.multiprocessing.get_all_start_methods()
START = "forkserver" if "forkserver" in _METHODS else "spawn"  # Windows has the second only
# Optimisers import the first when they are made.
_IMPORTED = [
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    "sklearn.datasets",
]


def context() -> Any:
    """What makes processes, each with nothing but imports before it."""
    made = torch.multiprocessing.get_context(START)
    if START == "forkserver":
        made.set_forkserver_preload(_IMPORTED)
    return made


def two_that_meet(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run `function(rank, folder, *args)` in a process group of two.

    Args:
        function: What each of them does.
        folder: Where they meet, and may leave what they find.
        *args: What else the function takes.
    """
    context()
    torch.multiprocessing.start_processes(
        _join, (function, str(folder), args), nprocs=2, start_method=START
    )


def _join(rank: int, function: Callable[..., None], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = os.path.join(folder, "meet")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    function(rank, folder, *args)
    torch.distributed.destroy_process_group()
