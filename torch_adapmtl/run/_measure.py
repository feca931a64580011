"""Counting the zeros of a model for its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_adapmtl.layers.layer import Layer, count_gone, members
from torch_adapmtl.components.find import FROZEN, UNUSED, Components
from torch_adapmtl.run.report import ComponentRow, LayerRow, Report

__all__ = ["measure"]


def measure(
    layers: Sequence[Layer],
    thresholds: Tensor,
    components: Components,
    others: Sequence[tuple[str, int]],
    **progress: Any,
) -> Report:
    """Count the zeros in the weights as the model sees them now; reads every weight.

    Args:
        layers: The layers, in the model's order.
        thresholds: Their thresholds, (L,).
        components: What was found in the model.
        others: Names and sizes of what is not prunable.
        **progress: What else the report holds.
    """
    zeros = torch.stack([(layer.sparse() == 0).sum().cpu() for layer in layers]).tolist()
    layer_rows = tuple(
        LayerRow(layer.name, layer.component, tuple(layer.weight.shape), count, alpha)
        for layer, count, alpha in zip(layers, zeros, thresholds.tolist(), strict=True)
    )
    indices = members(layers)
    by_component = {name: [layer_rows[i] for i in indices[name]] for name in components.names}
    dense = [
        (tensor.name, reason, tensor.parameter.numel())
        for reason in (UNUSED, FROZEN)
        for tensor in components[reason]
    ]
    return Report(
        components=tuple(
            ComponentRow(
                name, len(rows), sum(row.weights for row in rows), sum(row.zeros for row in rows)
            )
            for name, rows in by_component.items()
        ),
        layers=layer_rows,
        given=sum(count_gone(layer.given_mask) for layer in layers),
        dense=[*dense, *((name, "not prunable", count) for name, count in others)],
        **progress,
    )
