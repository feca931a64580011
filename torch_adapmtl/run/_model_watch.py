"""Warnings that the model is no longer the one that was prepared, although it can be pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from torch_adapmtl.components.find import FROZEN, Components
from torch_adapmtl.layers.collection import Layers

__all__ = ["ModelWatch"]


class ModelWatch:
    """Finds weights that were frozen, unfrozen or added after the model was prepared.

    Args:
        model: The model when it is prepared.
        components: Its components.
        layers: Its layers.
    """

    def __init__(self, model: nn.Module, components: Components, layers: Layers) -> None:
        self._names = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        self._frozen = [
            (tensor.name, tensor.owners[0])
            for tensor in components[FROZEN]
            if not tensor.parameter.requires_grad
        ]
        self._trained = {layer.name for layer in layers if layer.weight.requires_grad}
        self._given: set[str] = set()

    def look(self, model: nn.Module, layers: Layers) -> list[str]:
        """Return the warnings that have not been given before."""
        found = dict(self._look(model, layers))
        new = [text for kind, text in found.items() if kind not in self._given]
        self._given |= found.keys()
        return new

    def _look(self, model: nn.Module, layers: Layers) -> Iterator[tuple[str, str]]:
        trained = [
            name
            for name, (module, tensor) in self._frozen
            if (weight := module._parameters.get(tensor)) is not None and weight.requires_grad
        ]
        if trained:
            yield (
                "unfrozen",
                f"{_some(trained)} had requires_grad=False when apply_adapmtl was called, and "
                f"{_is(trained)} trained now, but dense and not counted. To prune weights that "
                f"are frozen at first, name them in groups=, as in "
                f"groups={{'shared': ['encoder']}}, or call apply_adapmtl when all are trained",
            )
        frozen = [
            layer.name
            for layer in layers
            if layer.name in self._trained and not layer.weight.requires_grad
        ]
        if frozen:
            yield (
                "frozen",
                f"{_some(frozen)} {_is(frozen)} pruned, but had requires_grad set to False after "
                f"apply_adapmtl, so that the weights that remain cannot adapt. Freeze before "
                f"apply_adapmtl, which leaves frozen weights dense, or pass them as exclude=",
            )
        pruned = {id(layer.weight) for layer in layers}  # attaching may have changed their names
        added = [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and name not in self._names and id(parameter) not in pruned
        ]
        if added:
            yield (
                "added",
                f"{_some(added)} {_is(added)} in the model, but {_was(added)} not when "
                f"apply_adapmtl was called: dense, and not counted. If it is to be pruned, change "
                f"the model first and call apply_adapmtl then",
            )


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return repr(names[0])
    return f"{len(names)} tensors such as {names[0]!r}"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _was(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"
