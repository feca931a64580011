"""Refusing weights whose zeros the model does not use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch_adapmtl.components._inventory import OwnedParameter
from torch_adapmtl.components._weight_use import WeightUse

__all__ = ["check_use"]

_LISTED = 8  # names at most, where a shorter remedy than all names exists


def check_use(weights: Mapping[int, OwnedParameter], use: WeightUse) -> None:
    """Raise a `ValueError` if the model uses other values than those of some weights.

    Args:
        weights: The weights to prune, by the parameter's id.
        use: What the model does with them.
    """
    if remade := [owned for key, owned in weights.items() if key in use.remade]:
        raise ValueError(
            f"{_count(remade, weights)} not what an operation receives: {_names(remade)}. The "
            "model computes another weight from it in forward (it standardises or centres it, for "
            "instance), which is not zero where the weight is: the sparsity of these weights would "
            f"be reported and not be used. Leave them out with {_exclude(remade, weights)}"
        )
    if written := [owned for key, owned in weights.items() if key in use.written | use.replaced]:
        raise ValueError(
            f"{_count(written, weights)} written to in forward: {_names(written)}. What the model "
            "writes there (a norm bound, a clamp, a mask multiplied into weight.data) and what "
            "pruning sets to zero would undo each other. Compute the weight that the operation "
            "receives without changing the parameter, as in F.linear(x, self.weight * mask), or "
            f"write to it after the optimizer's step; or leave them out with "
            f"{_exclude(written, weights)}"
        )


def _count(chosen: Collection[OwnedParameter], weights: Collection[int]) -> str:
    return f"{len(chosen)} of {len(weights)} weights to prune {'is' if len(chosen) == 1 else 'are'}"


def _names(chosen: list[OwnedParameter]) -> str:
    names = [f"{owned.names[0]} ({_kind(owned)})" for owned in chosen[:_LISTED]]
    more = len(chosen) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _exclude(chosen: list[OwnedParameter], weights: Mapping[int, OwnedParameter]) -> str:
    """Return the argument `exclude=` for some weights: by their type, if there are many of one."""
    kinds = sorted({_kind(owned) for owned in chosen})
    all_of_kind = [owned for owned in weights.values() if _kind(owned) in kinds]
    if len(chosen) > _LISTED and len(all_of_kind) == len(chosen):
        return f"exclude=[m for m in model.modules() if type(m).__name__ in {kinds}]"
    return f"exclude={[owned.names[0] for owned in chosen]}"


def _kind(owned: OwnedParameter) -> str:
    return type(owned.owners[0][0]).__name__
