"""Taking back tensors of a probe that a model has put into a cache outside of itself.

A cache that a module holds is restored with the module. One behind `functools.lru_cache`, or in a
dict of the class or of the Python module, would hand a tensor without data to the next real run.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor

__all__ = ["forget"]

# From a tensor to its cache: over a tuple or list, and over the links of an lru_cache.
_FARTHEST = 5


def forget(tensors: Collection[weakref.ref[Tensor]]) -> None:
    """Empty the caches that keep any of these alive.

    Raises:
        RuntimeError: If one is kept by something that is not known to be a cache.
    """
    if not _alive(tensors):
        return
    gc.collect()  # what only cycles keep
    for reference in tensors:
        if (tensor := reference()) is not None:
            _drop(tensor)
        del tensor
    # Only now: one may be kept by another, as the base of a view that a cache holds.
    for reference in tensors:
        if (tensor := reference()) is not None:
            raise RuntimeError(
                f"the model keeps a {type(tensor).__name__} that it made while it was looked at "
                "outside of its modules, where it cannot be taken back. Run the model once before, "
                "so that it keeps a real tensor, or pass groups= for all weights"
            )


def _alive(tensors: Collection[weakref.ref[Tensor]]) -> bool:
    return any(reference() is not None for reference in tensors)


def _drop(tensor: Tensor) -> None:
    """Delete the dict entries that hold it and clear the lru_caches that do, also indirectly."""
    level: list[Any] = [tensor]
    seen = {id(tensor), id(level)}
    for _ in range(_FARTHEST):
        found: list[Any] = []
        seen.add(id(found))
        for item in level:
            for holder in gc.get_referrers(item):
                if id(holder) in seen or isinstance(holder, types.FrameType):
                    continue
                seen.add(id(holder))
                if isinstance(holder, functools._lru_cache_wrapper):
                    holder.cache_clear()
                elif type(holder) is dict:
                    if not _is_namespace(holder):
                        for key in [key for key, value in holder.items() if value is item]:
                            del holder[key]
                else:
                    found.append(holder)
        level = found


def _is_namespace(items: dict[Any, Any]) -> bool:
    """Whether a dict holds the attributes of something, and so is no cache."""
    return any(
        getattr(holder, "__dict__", None) is items
        or getattr(holder, "__globals__", None) is items
        or (isinstance(holder, type) and items.keys() == vars(holder).keys())
        for holder in gc.get_referrers(items)
    )
