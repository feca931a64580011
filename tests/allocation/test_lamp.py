"""Layer-adaptive magnitude against a plain version of it, and what it does to the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Error, raises
from torch import Tensor
from toys import Bag, TwoTasks, prepare, train, weights, zeros

from torch_adapmtl import Adaptive, LAMPAllocation, Layers, apply_adapmtl
from torch_adapmtl.allocation.lamp import lamp_thresholds
from torch_adapmtl.budget.solver import Scores
from torch_adapmtl.layers import sampling
from torch_adapmtl.layers.sampling import Sample

SHAPES = [(8, 6), (20, 5), (3, 4, 2), (2, 2)]
TOTAL = 48 + 100 + 24 + 4
GROUPS = {"a": ["layers.0", "layers.1"], "b": ["layers.2", "layers.3"]}


def plain(layers: list[Tensor], zeros: int) -> list[float]:
    """LAMP (Lee et al., arXiv 2010.07611), weight by weight: the largest pruned in each layer."""
    scores = []
    for index, layer in enumerate(layers):
        squares = sorted(w.item() ** 2 for w in layer.flatten())
        for i, square in enumerate(squares):
            scores.append((square / sum(squares[i:]) if square else 0.0, index, square**0.5))
    highest = [0.0] * len(layers)
    for _, index, magnitude in sorted(scores)[:zeros]:
        highest[index] = max(highest[index], magnitude)
    return highest


def bag(seed: int, spread: float) -> Bag:
    """Layers of quite different scales."""
    torch.manual_seed(seed)
    model = Bag(SHAPES, torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.normal_().mul_(10 ** (spread * torch.randn(()).item()))
    return model


def sorted_sample(layers: Layers) -> Scores:
    sample = Sample.draw(layers)
    return Scores(sample.values, sample.lengths, sample.weights)


def drawn(model: Bag) -> Scores:
    pruner = apply_adapmtl(model, target_sparsity=0.5, total_steps=10, groups=GROUPS)
    return sorted_sample(pruner.layers)


@given(
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    share=st.floats(0, 0.97),  # the last weight of every layer has the score 1: a tie
)
@settings(max_examples=40)
def test_thresholds_are_those_of_plain_lamp(seed: int, spread: float, share: float) -> None:
    model = bag(seed, spread)
    expected = [layer.weight.detach().clone() for layer in model.layers]
    count = round(share * TOTAL)
    found = lamp_thresholds(drawn(model), count)
    assert found.tolist() == pytest.approx(plain(expected, count), rel=1e-6)


@given(scale=st.floats(1e-3, 1e3), share=st.floats(0.05, 0.95))
@settings(max_examples=20)
def test_a_layers_scale_does_not_matter(scale: float, share: float) -> None:
    """Scaling a layer scales its threshold, and prunes the same weights of it."""
    model, scaled = bag(0, 0.0), bag(0, 0.0)
    with torch.no_grad():
        scaled.layers[1].weight.mul_(scale)
    count = round(share * TOTAL)
    found = lamp_thresholds(drawn(model), count)
    found[1] *= scale
    torch.testing.assert_close(lamp_thresholds(drawn(scaled), count), found)


def test_masked_and_zero_weights_go_first() -> None:
    model = bag(0, 0.0)
    with torch.no_grad():
        model.layers[0].weight[:4] = 0.0
    pruner = apply_adapmtl(model, target_sparsity=0.5, total_steps=10, groups=GROUPS)
    pruner.layers[1].threshold.mask = torch.zeros(20, 5, dtype=torch.bool)
    sample = sorted_sample(pruner.layers)
    gone = 24 + 100
    assert lamp_thresholds(sample, gone).tolist() == [0.0] * 4
    assert lamp_thresholds(sample, gone + 30).max() > 0


def test_a_sample_comes_near(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Bag([(100, 120), (80, 200)], torch.float32)
    with torch.no_grad():
        model.layers[1].weight.mul_(20)
    groups = {"a": ["layers.0"], "b": ["layers.1"]}
    pruner = apply_adapmtl(model, target_sparsity=0.5, total_steps=10, groups=groups)
    found = []
    for size in (2**17, 4000):
        monkeypatch.setattr(sampling, "SAMPLE", size)
        found.append(lamp_thresholds(sorted_sample(pruner.layers), 20_000))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:.*no weight has changed")
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_offsets_settle_at_the_strengths_share_of_the_way(strength: float) -> None:
    model = bag(1, 1.0)
    allocation = LAMPAllocation(strength=strength)
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.6,
        total_steps=200,
        groups=GROUPS,
        method=Adaptive(allocation=allocation),
    )
    for _ in range(130):
        pruner.step()  # without an optimiser: the weights stay
    sizes = torch.tensor(pruner.layers.sizes)
    with pruner.sparse_weights.dense():
        alpha = lamp_thresholds(sorted_sample(pruner.layers), 0.6 * TOTAL)
    pruned = alpha > 0  # the smallest layer may lose nothing, and then stays as it is
    assert pruned[:3].all()
    log, share = alpha[pruned].log(), sizes[pruned] / sizes[pruned].sum()
    wanted = strength * (log - (log * share).sum())
    found = pruner.controller.offsets.by_layer()
    torch.testing.assert_close(found[pruned], wanted, rtol=1e-3, atol=1e-3)
    assert strength == 0 or wanted.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*no weight has changed")
def test_one_offset_a_component() -> None:
    pruner = apply_adapmtl(
        bag(1, 1.0),
        target_sparsity=0.6,
        total_steps=60,
        groups=GROUPS,
        method=Adaptive(granularity="component"),
    )
    for _ in range(60):
        pruner.step()
    a, b, c, d = pruner.controller.offsets.by_layer().tolist()
    assert a == b != c == d


@pytest.mark.parametrize("target", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_budget_is_met_exactly(target: float, strength: float) -> None:
    model = TwoTasks()
    pruner = prepare(
        model,
        target_sparsity=target,
        total_steps=50,
        allocation=LAMPAllocation(strength=strength),
    )
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(50))
    assert zeros(pruner) == round(target * weights(pruner))


def test_all_weights_zero_move_nothing() -> None:
    model = TwoTasks()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    pruner = prepare(model, total_steps=20)
    for _ in range(10):
        pruner.step()
    assert pruner.controller.offsets.by_layer().tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"strength": -0.1}, ValueError, "strength", "got -0.1", "in [0, 1]"),
        ({"strength": 1.1}, ValueError, "strength", "got 1.1", "in [0, 1]"),
        ({"rate": 0.0}, ValueError, "rate", "got 0.0", "in (0, 1]"),
        ({"rate": float("nan")}, ValueError, "rate", "got nan", "in (0, 1]"),
        ({"rate": None}, TypeError, "rate", "got None", "be a number"),
        ({"bound": float("inf")}, ValueError, "bound", "got inf", "> 0 and finite"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: LAMPAllocation(**options), error, f"allocation: {named}", found, remedy)
