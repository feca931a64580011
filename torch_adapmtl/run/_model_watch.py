"""Warnings that the model is not the one that was prepared, although it can be pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torch_adapmtl.components._detect import keep_zeros
from torch_adapmtl.components.find import FROZEN, UNUSED, Components
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer, count_zeros
from torch_adapmtl.layers.optimizer_hooks import warn_if_trained
from torch_adapmtl.tensor.thresholding import SoftThreshold

__all__ = ["ModelWatch", "watch_unreached", "watch_zeros"]


class ModelWatch:
    """Finds weights that are pruned while frozen, or were unfrozen or added after the preparation.

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
        self._given: set[str] = set()
        self._parametrizations = {layer.name: _parametrizations(layer) for layer in layers}

    def problem(self, layer: Layer) -> str:
        """Explain why the model does not use the zeros of a layer; an empty string if it does.

        Parametrizations that were there when the model was prepared have been looked at then.
        """
        found = _parametrizations(layer)
        if found == self._parametrizations[layer.name]:
            return ""
        for chain in found:
            if not keep_zeros(layer.weight, chain):
                kinds = ", ".join(type(parametrization).__name__ for parametrization in chain)
                name = layer.owners[0][1]
                return (
                    f"is computed by {kinds} since apply_adapmtl, and is then not zero where the "
                    f"pruned parameter is, so that zeros would be counted which the model does not "
                    f"use: remove the parametrization (torch.nn.utils.parametrize."
                    f"remove_parametrizations(module, {name!r}, leave_parametrized=False)), or "
                    f"leave this layer out (exclude=). To go on without pruning, call undo()"
                )
        self._parametrizations[layer.name] = found
        return ""

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
            # Reads the weight, so no more once it was warned of.
            if "frozen" not in self._given and not layer.weight.requires_grad and _is_pruned(layer)
        ]
        if frozen:
            yield (
                "frozen",
                f"{_some(frozen)} {_is(frozen)} pruned, but {_has(frozen)} requires_grad=False, so "
                f"that the weights that remain cannot adapt. If they are to be trained later, let "
                f"the schedule start then (SparsitySchedule(start=...)); to leave them dense, pass "
                f"them as exclude=, or freeze them before apply_adapmtl and in no group",
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


def _is_pruned(layer: Layer) -> bool:
    """Whether more than a hundredth of a layer is zero that was not when the run began.

    Before a schedule starts from a few zeros, the level that is found for them may take some more.
    """
    zeros = int((layer.sparse() == 0).sum()) - count_zeros(layer.initial_mask)
    return zeros > 0.01 * layer.weight.numel()


def _parametrizations(layer: Layer) -> list[list[nn.Module]]:
    """The modules from which each owner of a layer computes its tensor, without our threshold."""
    found = []
    for module, name in layer.owners:
        chain: Any = ()
        if parametrize.is_parametrized(module, name):
            chain = module.parametrizations[name]  # type: ignore[index]
        found.append([p for p in chain if not isinstance(p, SoftThreshold)])
    return found


def watch_unreached(components: Components) -> object:
    """Warn, once, if an optimiser trains weights that no gradient was to reach.

    Returns:
        What `stop_warning` takes.
    """
    tensors = [t for t in (*components[UNUSED], *components[FROZEN]) if t.parameter.requires_grad]
    weights = [(tensor.parameter, tensor.name) for tensor in tensors]
    return warn_if_trained(weights, partial(_unreached, len(weights)))


def _unreached(total: int, names: list[str]) -> str:
    return (
        f"{_some(names)} {_is(names)} trained, but among {total} prunable tensors that no gradient "
        f"of a task's output reached when apply_adapmtl ran the model: these stay dense, and are "
        f"not counted. If the model chooses its parts at random or by its input, as it may choose "
        f"experts, name them in groups=, as in groups={{'shared': ['experts']}}; to leave them "
        f"dense without this warning, pass them as exclude="
    )


def watch_zeros(layers: Layers) -> None:
    """Warn, once, if an optimiser trains these weights after `finalize`, so that zeros get lost."""
    held = (layer for layer in layers if layer.threshold.earlier_mask is None)
    # The others' zeros are held by torch.nn.utils.prune.
    warn_if_trained(((layer.weight, layer.name) for layer in held), _lost)


def _lost(names: list[str]) -> str:
    return (
        f"an optimizer trains {names[0]!r} after finalize(): its zeros, and those of "
        f"{len(names) - 1} other tensors, do not stay zero. To finetune with zeros, train before "
        f"finalize(), or call keep_zeros(model) first"
    )


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return repr(names[0])
    return f"{len(names)} tensors such as {names[0]!r}"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _was(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"
