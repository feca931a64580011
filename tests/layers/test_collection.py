"""The layers of a run as one collection, against plain loops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_adapmtl import Layer, Layers

SHAPES = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6
)


def collection(shapes: list[tuple[int, ...]], names: list[str]) -> Layers:
    layers = []
    for i, shape in enumerate(shapes):
        module: Any = nn.Module()
        module.weight = nn.Parameter(torch.randint(-1, 2, shape).float())
        layers.append(Layer(f"{i}.weight", names[i % len(names)], ((module, "weight"),)))
    return Layers(layers)


@given(
    shapes=SHAPES,
    names=st.lists(st.sampled_from(["shared", "a", "b", "a+b"]), min_size=1, max_size=6),
    sparsity=st.floats(0, 1),
)
def test_figures_are_those_of_plain_loops(
    shapes: list[tuple[int, ...]], names: list[str], sparsity: float
) -> None:
    layers = collection(shapes, names)
    assert len(layers) == len(shapes)
    assert [layer.name for layer in layers] == [layers[i].name for i in range(len(layers))]
    assert layers[1:] == tuple(layers)[1:]

    sizes = []
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        sizes.append(size)
    assert layers.sizes == sizes
    assert layers.total == sum(sizes)
    assert layers.budget(sparsity) == round(sparsity * sum(sizes))

    order: list[str] = []
    for i in range(len(shapes)):
        if names[i % len(names)] not in order:
            order.append(names[i % len(names)])
    assert layers.components == tuple(order)
    assert [order[index] for index in layers.component] == [layer.component for layer in layers]
    assert layers.names == {layer.name: layer.component for layer in layers}

    by_component = dict.fromkeys(order, 0)
    for layer, size in zip(layers, sizes, strict=True):
        by_component[layer.component] += size
    assert layers.sum_components(layers.sizes) == list(by_component.values())


@given(shapes=SHAPES, masked=st.floats(0, 1), threshold=st.sampled_from([0.0, 0.5, 1.0]))
def test_zeros_are_counted_as_the_model_sees_them(
    shapes: list[tuple[int, ...]], masked: float, threshold: float
) -> None:
    layers = collection(shapes, ["shared"])
    initial, now = [], []
    for i, layer in enumerate(layers):
        layer.threshold.set_threshold(threshold)
        if i % 2:
            layer.initial_mask = torch.rand(layer.weight.shape) >= masked
            layer.threshold.mask = layer.initial_mask
        flat = layer.weight.flatten().tolist()
        mask = [True] * len(flat) if layer.mask is None else layer.mask.flatten().tolist()
        initial.append(mask.count(False))
        now.append(sum(not m or abs(w) <= threshold for w, m in zip(flat, mask, strict=True)))
    assert layers.initial_zeros == initial
    assert layers.count_zeros() == now
