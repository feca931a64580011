"""Methods of the user's: what comes with the base classes, without a line for it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from matrix import STAGES, check
from matrix import Row as Cell
from matrix_rows import on_copy
from torch import Tensor, nn
from toys import Bag, TwoTasks, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import (
    Controller,
    Layers,
    MaskController,
    Method,
    SparsitySchedule,
    apply_adapmtl,
)
from torch_adapmtl.tensor import SoftThreshold


@dataclass(frozen=True)
class RandomPruning(Method):
    """The masks of docs/recipes/own-method.md: every weight draws its score once."""

    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return RandomMasks(layers, target_sparsity, total_steps, self.schedule)


class RandomMasks(MaskController):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.store("score")
        for score in self.stored("score"):
            score.uniform_()

    def scores(self) -> list[Tensor]:
        return self.stored("score")


@dataclass(frozen=True)
class Movement(Method):
    """Keeps what training moves away from zero, as the same page has it."""

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return MovementMasks(layers, target_sparsity, total_steps, SparsitySchedule())


class MovementMasks(MaskController):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.store("movement")

    @torch.no_grad()
    def on_gradient(self, index: int, weight: nn.Parameter) -> None:
        self.stored("movement")[index].sub_(weight * weight.grad)

    def scores(self) -> list[Tensor]:
        return self.stored("movement")


@dataclass(frozen=True)
class FirstComeFirstPruned(Method):
    """One threshold for all layers, which rises; what is missing at the end goes in order."""

    rise: float = 0.01

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return RisingThresholds(self, layers, target_sparsity, total_steps)


class RisingThresholds(Controller):
    """The least that a controller of thresholds has to say."""

    alpha: Tensor

    def __init__(
        self, method: FirstComeFirstPruned, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps)
        self.method = method
        self.register_buffer("alpha", torch.zeros(len(layers)))
        for layer in layers:
            layer.threshold = SoftThreshold(0.0, persistent=False)

    def thresholds(self) -> Tensor:
        return self.alpha.clone()

    def update(self, step: int) -> None:
        self.alpha.fill_(self.method.rise * step)
        self.refresh()

    def refresh(self) -> None:
        for layer, alpha in zip(self.layers, self.alpha.tolist(), strict=True):
            layer.threshold.set_threshold(0.0 if self.fixed else alpha)

    def fix(self) -> None:
        left, keep = self.budget, []
        for size in self.layers.sizes:
            keep.append(torch.arange(size) >= left)
            left = max(0, left - size)
        self.fix_zeros(keep)
        self.refresh()  # the weights that remain train on without a threshold


METHODS: dict[str, Method] = {
    "random": RandomPruning(),
    "movement": Movement(),
    "thresholds": FirstComeFirstPruned(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")  # nothing keeps any


@methods
@pytest.mark.parametrize("target", [0.0, 0.37, 0.95])
@pytest.mark.parametrize("total", [1, 7, 20])
def test_zeros_are_exact(method: Method, target: float, total: int) -> None:
    model = TwoTasks()
    keys = list(model.state_dict())
    pruner = prepare(model, total_steps=total, target_sparsity=target, method=method)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, weight_decay=1e-2))
    train(model, pruner, optimizer, range(total))
    wanted = round(target * weights(pruner))
    assert zeros(pruner) == wanted
    sum(loss for loss in losses(model, 99).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert zeros(pruner) == wanted
    assert pruner.sparsity() == wanted / weights(pruner)
    pruner.finalize()
    assert zeros(pruner) == wanted
    assert list(model.state_dict()) == keys


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_zeros_are_exact_in_every_precision(method: Method, dtype: torch.dtype) -> None:
    model = Bag([(7, 5), (3, 2, 3), (1, 1)], dtype)
    groups = {"a": ["layers.0", "layers.2"], "b": ["layers.1"]}
    pruner = apply_adapmtl(model, target_sparsity=0.6, total_steps=6, groups=groups, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        pruner.loss(model.losses(groups)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    pruner.finalize()
    assert zeros(pruner) == round(0.6 * 54)


@methods
@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_as_the_original(
    method: Method, stage: str, copier: Callable[[Any], Any]
) -> None:
    check(Cell(on_copy(copier), same=True, options={"method": method}), stage)


@methods
@pytest.mark.parametrize("stop", [0, 7, 8, 19, 20])
def test_a_loaded_state_goes_on_bit_for_bit(method: Method, stop: int) -> None:
    model, fresh = TwoTasks(), TwoTasks()
    pruner, other = prepare(model, method=method), prepare(fresh, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(stop))
    fresh.load_state_dict(model.state_dict())
    again = torch.optim.SGD(fresh.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(stop, 20))
    train(fresh, other, again, range(stop, 20))
    assert all(torch.equal(value, tensors(fresh)[key]) for key, value in tensors(model).items())
    pruner.finalize()
    other.finalize()
    assert all(torch.equal(value, tensors(fresh)[key]) for key, value in tensors(model).items())


def test_a_state_is_refused_by_a_run_with_other_settings() -> None:
    model, fresh = TwoTasks(), TwoTasks()
    prepare(model, method=FirstComeFirstPruned(0.02))
    prepare(fresh, method=FirstComeFirstPruned())
    with pytest.raises(ValueError, match=r"method\.rise=0\.02, .* method\.rise=0\.01: prepare it"):
        fresh.load_state_dict(model.state_dict())


@dataclass(frozen=True)
class Broken(Method):
    """Scores that are not numbers, or of too few layers."""

    missing: bool

    def controller(self, layers: Layers, model: nn.Module, **run: Any) -> MaskController:
        return BrokenMasks(layers, **run, schedule=SparsitySchedule(), missing=self.missing)


class BrokenMasks(MaskController):
    def __init__(self, *args: Any, missing: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.missing = missing

    def scores(self) -> list[Tensor]:
        found = [layer.weight.detach().abs() for layer in self.layers]
        return found[1:] if self.missing else [found[0] / 0 * 0, *found[1:]]


@pytest.mark.parametrize(
    ("missing", "message"),
    [(True, "2 tensors for 3 layers"), (False, r"scores\(\) has NaN for 'body\.weight'")],
)
def test_scores_that_rank_nothing_are_refused(missing: bool, message: str) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=Broken(missing))
    before = copy.deepcopy(tensors(model))
    with pytest.raises(ValueError, match=message):
        pruner.fix_zeros()
    assert not pruner.zeros_fixed
    assert all(torch.equal(x, before[name]) for name, x in tensors(model).items())
