"""What a budget counts: weights, or the multiply-adds that they take part in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from torch_adapmtl._checks import check_choice, check_numbers
from torch_adapmtl._distributed import agree
from torch_adapmtl.components._inventory import Inventory, Selector
from torch_adapmtl.components.find import PrunableTensor

__all__ = ["Count", "check_budget_count", "positions_of"]

Count = Literal["weights", "macs"] | Mapping[Selector, float]
"""`"weights"`, `"macs"`, or the positions of some tensors, by selector, for multiply-adds."""


def check_budget_count(count: object) -> Literal["weights", "macs"]:
    """Return what a budget counts, or raise an error if `count` is not a `Count`."""
    if not isinstance(count, Mapping):
        check_choice("count", count, ("weights", "macs"), "a mapping of positions")
        return "weights" if count == "weights" else "macs"
    for selector, positions in count.items():
        what = f"count: the positions of {selector if isinstance(selector, str) else 'a module'!r}"
        check_numbers(**{what: positions})
        if not 0 < positions < math.inf:
            raise ValueError(
                f"{what} must be a finite number > 0, got {positions}: how many multiply-adds "
                f"each weight takes part in, for one example"
            )
    return "macs"


def positions_of(
    count: Count,
    tensors: Sequence[PrunableTensor],
    inventory: Inventory | None,
    *,
    synchronize: bool,
) -> list[float | None]:
    """Return the positions of each tensor: those that the user gives, or that were measured.

    Args:
        count: What the user asks for.
        tensors: The tensors.
        inventory: Finds the tensors that a mapping selects; not needed if `count` is a word.
        synchronize: Whether processes that train together use the numbers of the first one.

    Raises:
        ValueError: If a selector matches nothing.
    """
    given: dict[int, float] = {}
    for selector, positions in count.items() if isinstance(count, Mapping) else ():
        assert inventory is not None
        selected = inventory.select(selector, "count")
        if not selected:
            raise ValueError(
                f"count: {selector!r} matches no prunable tensor: name one of "
                f"{[tensor.name for tensor in tensors[:5]]}, or a module that holds one"
            )
        given.update(dict.fromkeys(selected, float(positions)))
    found = [given.get(id(tensor.parameter), tensor.positions) for tensor in tensors]
    if count != "weights" and synchronize:
        # The processes may have measured on inputs of different sizes.
        values = torch.tensor(
            [math.nan if positions is None else positions for positions in found],
            dtype=torch.float64,
            device=tensors[0].parameter.device,
        )
        found = [None if math.isnan(value) else value for value in agree(values).tolist()]
    return found
