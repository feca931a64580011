"""Which outputs depend on which weights, against an oracle."""

from __future__ import annotations

import torch
from finding import detected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_adapmtl import find_components
from torch_adapmtl.components.find import FROZEN, SHARED, UNUSED


class Random(nn.Module):
    """A random tree or net of layers: node `i` adds up what `parents[i]` give."""

    def __init__(self, parents: list[list[int]], tasks: list[int], tied: bool) -> None:
        super().__init__()
        self.parents, self.tasks = parents, tasks
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in parents)
        if tied:
            self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values: list[Tensor] = []
        for parents, layer in zip(self.parents, self.layers, strict=True):
            inputs = sum((values[p] for p in parents), start=x)
            values.append(layer(inputs).tanh())
        return {f"t{i}": values[node] for i, node in enumerate(self.tasks)}


@st.composite
def nets(draw: st.DrawFn, most_parents: int) -> Random:
    size = draw(st.integers(2, 9))
    parents = [
        draw(st.lists(st.integers(0, i - 1), unique=True, max_size=most_parents)) if i else []
        for i in range(size)
    ]
    tasks = draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=4))
    return Random(parents, tasks, tied=draw(st.booleans()))


def moved_outputs(model: nn.Module, parameter: nn.Parameter, x: Tensor) -> tuple[str, ...]:
    """The oracle: the outputs that turn into NaN when the parameter does."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
        outputs = model(x)
        parameter.copy_(before)
    return tuple(task for task, output in outputs.items() if output.isnan().any())


@settings(max_examples=40)
@given(model=st.one_of(nets(most_parents=1), nets(most_parents=3)))
def test_detection_equals_filling_with_nan(model: Random) -> None:
    x = torch.randn(2, 3)
    components = find_components(model, x)
    assert components.tasks == tuple(f"t{i}" for i in range(len(model.tasks)))
    for tensor in components.tensors:
        moved = moved_outputs(model, tensor.parameter, x)
        expected = SHARED if moved == components.tasks else "+".join(moved) or UNUSED
        assert tensor.component == expected


@settings(max_examples=20)
@given(model=nets(most_parents=3), frozen=st.sets(st.integers(1, 8)))
def test_freezing_changes_only_what_is_frozen(model: Random, frozen: set[int]) -> None:
    x = torch.randn(2, 3)
    model.tasks[0] = 0  # whose layer is never frozen, so that something is left to prune
    before = detected(model, x)
    for i in frozen & set(range(1, len(model.layers))):
        if model.layers[i].weight is not model.layers[0].weight:
            model.layers[i].requires_grad_(False)
    for tensor in find_components(model, x).tensors:
        was = before[tensor.name]
        stays = tensor.parameter.requires_grad or was == UNUSED
        assert tensor.component == (was if stays else FROZEN)
