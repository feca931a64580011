"""The parameters of a model as groups for an optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torch_adapmtl._checks import check_keys, check_rate
from torch_adapmtl.components.find import Components

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    components: Components,
    thresholds: Iterable[nn.Parameter],
    *,
    threshold_lr: float | None,
    threshold_decay: float,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Split the parameters into those of the model and the thresholds; see `Pruner.param_groups`.

    Args:
        model: The model.
        components: Its components.
        thresholds: Its parameters that train thresholds.
        threshold_lr: Learning rate of the thresholds; `lr` if None.
        threshold_decay: Weight decay of the thresholds.
        options: Settings of the optimiser for each group.
    """
    if "params" in options:
        raise TypeError("params must be left out: param_groups puts the parameters in itself")
    check_rate("threshold_lr", threshold_lr)
    trained = {id(p): p for p in thresholds}
    weights = {name: p for name, p in model.named_parameters() if id(p) not in trained}
    lr = options.get("lr")
    if isinstance(lr, Mapping):
        groups = _by_component(weights, components, lr, options)
        options = {**options, "lr": lr[components.names[0]]}
    else:
        check_rate("lr", lr)
        groups = [{"params": list(weights.values()), **options}]
    if trained:
        group = {"params": list(trained.values()), **options, "weight_decay": threshold_decay}
        if threshold_lr is not None:
            group["lr"] = threshold_lr
        groups.append(group)
    return groups


def _by_component(
    weights: Mapping[str, nn.Parameter],
    components: Components,
    rates: Mapping[str, float],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    names = components.names
    check_keys("lr", rates, "components", names)
    for name, rate in rates.items():
        check_rate(f"lr[{name!r}]", rate)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter, component in zip(
        weights.values(), _components(weights, components), strict=True
    ):
        members[component].append(parameter)
    return [{**options, "params": members[name], "lr": rates[name]} for name in names]


def _components(weights: Mapping[str, nn.Parameter], components: Components) -> list[str]:
    """The component of each parameter: its own, or that of the nearest pruned tensor.

    The nearest tensor shares the longest path with it. Among several, it is the last one before it.
    """
    own = {id(t.parameter): t.component for t in components.tensors}
    pruned = [
        (place, name.split(".")[:-1], own[id(p)])
        for place, (name, p) in enumerate(weights.items())
        if own.get(id(p)) in components.names
    ]
    found = []
    for place, (name, parameter) in enumerate(weights.items()):
        if own.get(id(parameter)) in components.names:
            found.append(own[id(parameter)])
            continue
        path = name.split(".")[:-1]
        near = max(pruned, key=lambda t: (_common(path, t[1]), t[0] < place, -abs(t[0] - place)))
        found.append(near[2])
    return found


def _common(first: list[str], second: list[str]) -> int:
    """How many of the first parts of two paths are equal."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
