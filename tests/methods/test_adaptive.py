"""The adaptive controller: exact zeros, the schedule, bounds, allocations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Error, raises
from toys import Bag, TwoTasks, losses, prepare, train, weights, zeros

from torch_adapmtl import (
    Adaptive,
    LAMPAllocation,
    Layers,
    Pruner,
    SparsitySchedule,
    apply_adapmtl,
    soft_threshold,
)
from torch_adapmtl.allocation._base import Allocation, Allocator
from torch_adapmtl.budget.solver import Scores
from torch_adapmtl.layers import sampling
from torch_adapmtl.methods.adaptive import shares_kept


@given(st.integers(0, 10**6), st.sampled_from(["lamp", "sensitivity", "common", "gradient"]))
@settings(max_examples=6)
def test_sparsity_follows_the_schedule(seed: int, allocation: Any) -> None:
    torch.manual_seed(seed)
    model = TwoTasks(20)
    schedule = SparsitySchedule(start=0.1, end=0.8, initial=0.2)
    pruner = prepare(model, total_steps=30, schedule=schedule, allocation=allocation)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, 30):
        train(model, pruner, optimizer, [step])
        # All weights are looked at, and none tie: each layer's threshold is off by a rounding.
        due = schedule(step, 30, 0.8) * weights(pruner)
        assert due - 4 <= zeros(pruner) <= due + 4
    train(model, pruner, optimizer, [30])
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_updates_are_rare_and_the_last_step_is_one() -> None:
    pruner = prepare(TwoTasks(), total_steps=1003, schedule=SparsitySchedule(fix_at=1.0))
    assert pruner.controller.interval == 10
    due = [step for step in range(1, 1004) if pruner.controller.due(step)]
    assert (due[0], due[-1]) == (11, 1003)
    apart = {b - a for a, b in itertools.pairwise(due[:-1])}
    assert apart == {10, 11}
    for period in range(2, 11):  # batches that take turns are all seen
        assert {step % period for step in due[:-1]} == set(range(period))


class Steady(Allocator):
    """Moves all offsets by the same amount at every update."""

    def moves(self, sample: Any, magnitudes: Any, thresholds: Any, offsets: Any, zeros: Any) -> Any:
        return torch.full_like(offsets, 0.01)


@dataclass(frozen=True)
class Drift(Allocation):
    bound: float = 10.0

    def allocator(self, layers: Layers, offsets: Any) -> Steady:
        return Steady()


@pytest.mark.filterwarnings("ignore:.*no weight has changed")
def test_offsets_come_to_rest() -> None:
    schedule = SparsitySchedule(start=0.0, end=0.6, fix_at=1.0)
    pruner = prepare(TwoTasks(), total_steps=100, schedule=schedule, allocation=Drift())
    path = []
    for _ in range(100):
        pruner.step()
        path.append(pruner.controller.offsets.by_layer()[0].item())
    moves = torch.tensor(path).diff()
    interval = pruner.controller.interval
    assert interval == 2
    assert moves[:58].max() == pytest.approx(0.01)
    late = moves[60:]
    assert late.max() < 0.01
    assert late[-1] == 0
    assert late[late > 0].diff().max() < 0  # ever less


@pytest.mark.parametrize(("end", "fix_at", "last"), [(0.5, None, 90), (0.95, None, 95), (0, 0, 1)])
def test_zeros_are_final_when_they_are_fixed(end: float, fix_at: Any, last: int) -> None:
    model = TwoTasks()
    schedule = SparsitySchedule(start=0.0, end=end, fix_at=fix_at)
    pruner = prepare(model, total_steps=100, schedule=schedule)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    layers = pruner.layers
    masks = []
    for step in range(100):
        train(model, pruner, optimizer, [step])
        assert pruner.controller.fixed == (step + 1 >= last)
        if pruner.controller.fixed:
            masks.append([layer.threshold.mask.clone() for layer in layers])
            assert zeros(pruner) == round(0.8 * weights(pruner))
            assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[-1], strict=True))
            assert all(layer.threshold.alpha == 0 for layer in layers)  # no shrinkage any more
    assert len(masks) == 101 - last
    for layer in layers:  # Adam moved what the masks hid; the last step has written the zeros
        assert not layer.weight[~layer.threshold.mask].any()


def _pruned_learn(model: TwoTasks, pruner: Pruner, step: int) -> bool:
    """Whether pruned weights have gradients in the next step; the others have."""
    model.zero_grad()
    pruner.loss(losses(model, step)).backward()
    gone = [layer.sparse() == 0 for layer in pruner.layers]
    gradients = [layer.weight.grad for layer in pruner.layers]
    assert all(grad[~zero].any() for grad, zero in zip(gradients, gone, strict=True))
    assert sum(int(zero.sum()) for zero in gone) > 0.5 * weights(pruner)
    learn = sum(int(grad[zero].count_nonzero()) for grad, zero in zip(gradients, gone, strict=True))
    assert learn <= len(gone) or learn > 0.3 * weights(pruner)
    return learn > len(gone)  # one a layer may lie on the threshold, where the gradient passes


def test_a_resumed_run_and_one_with_another_target_know_whether_pruned_weights_learn() -> None:
    options: dict[str, Any] = {"total_steps": 100, "target_sparsity": 0.7}
    model, fresh = TwoTasks(), TwoTasks()
    pruner, other = prepare(model, **options), prepare(fresh, **options)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=1e-3), range(80))
    fresh.load_state_dict(model.state_dict())
    assert not _pruned_learn(fresh, other, 80)
    other.retarget(0.8, total_steps=100)
    assert _pruned_learn(fresh, other, 0)


@pytest.mark.parametrize(("until", "last"), [(None, 70), (0.5, 50), (0.9, 90)])
@pytest.mark.parametrize("allocation", ["lamp", "gradient"])
def test_pruned_weights_learn_until_they_are_to_regrow_no_more(
    until: float | None, last: int, allocation: Any
) -> None:
    options: dict[str, Any] = {
        "total_steps": 100,
        "schedule": SparsitySchedule(regrow_until=until),
        "allocation": allocation,
        "target_sparsity": 0.6,
    }
    model = TwoTasks()
    pruner = prepare(model, **options)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=1e-3))
    for step in range(90):
        if step >= 50:
            assert _pruned_learn(model, pruner, step) == (step < last)
        train(model, pruner, optimizer, [step])


def test_the_mask_gradient_stays_one() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=100, gradient="mask")
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=1e-3), range(55))
    assert not _pruned_learn(model, pruner, 55)


def test_the_last_update_moves_no_threshold() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, pruner, optimizer, range(89))
    before = [layer.sparse() for layer in pruner.layers]
    thresholds = pruner.controller.thresholds()
    pruner.step()
    assert torch.equal(pruner.controller.thresholds(), thresholds)
    for layer, seen in zip(pruner.layers, before, strict=True):
        kept = layer.threshold.mask & (seen != 0)
        assert torch.equal(layer.weight[kept], seen[kept])
    changed = sum(int((a.sparse() != b).sum()) for a, b in zip(pruner.layers, before, strict=True))
    assert changed <= 4  # those that the exact number of zeros asks for


def test_a_sample_keeps_near_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAMPLE", 2000)
    monkeypatch.setattr(sampling, "LAYER_SAMPLE", 100)
    model = Bag([(100, 120), (40, 30, 3, 3), (10, 20)], torch.float32)
    groups = {"a": ["layers.0"], "b": ["layers.1", "layers.2"]}
    schedule = SparsitySchedule(start=0, end=0.1)
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.7,
        total_steps=100,
        groups=groups,
        method=Adaptive(schedule=schedule),
    )
    for _ in range(20):
        pruner.step()
    assert pruner.sparsity() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(("granularity", "shape"), [("layer", (3,)), ("component", (2,))])
def test_one_offset_a_layer_or_a_component(granularity: Any, shape: Any) -> None:
    groups = {"a": ["layers.0", "layers.2"], "b": ["layers.1"]}
    pruner = apply_adapmtl(
        Bag([(3, 3), (4, 4), (5, 5)], torch.float32),
        target_sparsity=0.5,
        total_steps=5,
        groups=groups,
        method=Adaptive(granularity=granularity),
    )
    assert pruner.controller.offsets.values.shape == shape
    assert [k for k in pruner.state_dict() if "offset" in k] == ["controller.offsets.values"]


@pytest.mark.filterwarnings("ignore:.*no weight has changed")
def test_common_thresholds_are_all_alike() -> None:
    pruner = prepare(TwoTasks(24), target_sparsity=0.4, total_steps=150, allocation="common")
    for _ in range(120):
        pruner.step()
    assert not pruner.controller.offsets.by_layer().any()
    assert len(set(pruner.controller.thresholds().tolist())) == 1
    assert pruner.controller.thresholds()[0] > 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"schedule": "cubic"}, TypeError, "schedule", "'cubic'", "SparsitySchedule(shape="),
        ({"granularity": "channel"}, ValueError, "granularity", "got 'channel'", "one of 'layer'"),
        ({"allocation": "uniform"}, ValueError, "allocation", "got 'uniform'", "one of 'lamp'"),
        ({"allocation": LAMPAllocation}, ValueError, "allocation", "got <class", "one of 'lamp'"),
        ({"gradient": "none"}, ValueError, "gradient", "got 'none'", "one of 'straight_through'"),
        ({"reach": 1.0}, ValueError, "reach", "got 1.0", "above 1"),
        ({"reach": math.nan}, ValueError, "reach", "got nan", "above 1"),
        ({"reach": "far"}, TypeError, "reach", "'far'", "a number"),
        ({"min_density": 1.5}, ValueError, "min_density", "got 1.5", "lie in [0, 1]"),
        (
            {"max_density": {"a": math.nan}},
            ValueError,
            "max_density of 'a'",
            "got nan",
            "lie in [0, 1]",
        ),
        ({"min_density": "some"}, TypeError, "min_density", "'some'", "a fraction"),
        ({"min_density": {"a": True}}, TypeError, "min_density of 'a'", "True", "a fraction"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: Adaptive(**options), error, named, found, remedy)


def test_a_mapping_of_densities_is_copied() -> None:
    densities = {"a": 0.2}
    method = Adaptive(min_density=densities)
    densities["a"] = 0.9
    assert method.min_density == {"a": 0.2}


# --- the magnitude of a layer ---------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["lamp", "gradient"])
def test_a_layer_keeps_the_magnitude_of_its_remaining_weights(allocation: Any) -> None:
    torch.manual_seed(0)
    model = TwoTasks(100)
    pruner = prepare(model, total_steps=30, allocation=allocation)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(15):
        train(model, pruner, optimizer, [step])
    assert pruner.controller.due(15)
    sparse = [layer.sparse().detach().clone() for layer in pruner.layers]
    with pruner.sparse_weights.dense():
        for layer, weight in zip(pruner.layers, sparse, strict=True):
            dense = layer.weight.detach()
            assert (weight.abs() <= 1.876 * dense.abs()).all()
            assert 1.5 < layer.threshold.scale < 20
            most = torch.minimum(
                layer.threshold.scale * soft_threshold(dense, layer.threshold.threshold()).abs(),
                1.875 * dense.abs(),
            )
            torch.testing.assert_close(weight.abs(), most)
            before, after = dense[weight != 0].abs().sum(), weight.abs().sum()
            assert 0.8 * before < after < 1.001 * before
    train(model, pruner, optimizer, range(15, 30))
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_with_a_reach_there_is_no_scale() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=30, reach=math.inf)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    train(model, pruner, optimizer, range(15))
    assert (pruner.controller.scale == 1).all()
    assert all(layer.threshold.scale == 1.0 for layer in pruner.layers)


def test_the_scale_has_a_limit() -> None:
    """Where the remaining weights are hardly above the threshold."""
    model = TwoTasks()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(1.0 + 1e-4 * torch.rand_like(weight))
    pruner = prepare(model, total_steps=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    train(model, pruner, optimizer, range(15))
    assert pruner.controller.scale.max() == 20


@given(
    layers=st.lists(
        st.lists(st.floats(0, 100, width=32) | st.sampled_from([1.0, math.inf]), min_size=1),
        min_size=1,
        max_size=4,
    ),
    threshold=st.floats(0, 100, width=32),
)
def test_what_shrinkage_leaves(layers: list[list[float]], threshold: float) -> None:
    magnitudes = Scores(
        torch.tensor([value for values in layers for value in values]),
        [len(values) for values in layers],
    )
    found = shares_kept(magnitudes, torch.full((len(layers),), threshold))
    for values, share in zip(layers, found.tolist(), strict=True):
        kept = torch.tensor([v for v in values if threshold < v < math.inf], dtype=torch.float64)
        left = soft_threshold(kept, threshold).sum()
        expected = 1.0 if not len(kept) else (left / kept.sum()).item()
        assert share == pytest.approx(expected, rel=1e-4, abs=1e-6)
