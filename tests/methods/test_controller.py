"""What the base of controllers guarantees, whatever a controller of one's own does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import (
    SNIP,
    ST3,
    STR,
    Controller,
    DiSparse,
    Layers,
    Magnitude,
    MaskController,
    Method,
    Paper,
    SoftThreshold,
    Taylor,
)


@dataclass(frozen=True)
class Soft(Method):
    """Thresholds on every layer that are still there when the zeros are fixed."""

    alpha: float = 0.05
    choose: int | None = None

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return SoftController(self, layers, target_sparsity, total_steps)


class SoftController(Controller):
    def __init__(self, method: Soft, layers: Layers, target: float, total_steps: int) -> None:
        super().__init__(layers, target, total_steps)
        self.method = method
        for layer in layers:
            layer.threshold = SoftThreshold(method.alpha, persistent=False)

    def thresholds(self) -> Tensor:
        return torch.full((len(self.layers),), self.method.alpha)

    def fix(self) -> None:
        if self.method.choose is None:
            self.fix_lowest([layer.weight.abs() for layer in self.layers])
            return
        flat = torch.ones(self.layers.total, dtype=torch.bool)
        flat[: self.method.choose] = False
        self.fix_zeros(list(flat.split(self.layers.sizes)))


def test_thresholds_end_when_the_zeros_are_fixed() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=Soft())
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    wanted = round(0.8 * weights(pruner))
    assert zeros(pruner) == wanted
    before = tensors(pruner.finalize())
    assert sum(int((before[name] == 0).sum()) for name in before if "weight" in name) == wanted


@pytest.mark.parametrize("choose", [0, 100, 168])
def test_a_choice_of_another_number_is_refused(choose: int) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=Soft(choose=choose))
    before = tensors(model)
    with pytest.raises(RuntimeError, match=rf"fix 134 zeros of 168 weights, and chose {choose}"):
        pruner.fix_zeros()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


@pytest.mark.filterwarnings("ignore:no weight is left")
def test_what_is_changed_after_fixing_is_found_by_finalize() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    pruner.fix_zeros()
    before = tensors(model)
    layer = pruner.layers[0]
    layer.threshold.set_threshold(10.0)
    with pytest.raises(RuntimeError, match=r"threshold 10\.0 on 'body.weight'.*Leave both alone"):
        pruner.finalize()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    layer.threshold.set_threshold(0.0)
    layer.threshold.mask = torch.ones_like(layer.mask)
    with pytest.raises(RuntimeError, match=r"zeros in place of the 134.*Leave both alone"):
        pruner.finalize()


@pytest.mark.parametrize(
    "method", [Magnitude(), Taylor(), ST3(), STR(start=-1.2), "adaptive", Soft()], ids=str
)
def test_zeros_fixed_in_inference_mode_are_for_training(method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=method)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    with torch.inference_mode():
        pruner.fix_zeros()
    pruner.loss(losses(model, 0)).backward()
    assert zeros(pruner) == round(0.8 * weights(pruner))


@pytest.mark.parametrize("method", [SNIP(), SNIP(batches=3), DiSparse()], ids=str)
def test_one_shot_methods_that_saw_no_loss_prune_nothing(method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=method)
    with pytest.raises(RuntimeError, match=r"0 of \d batches have been scored.*pruner.loss"):
        pruner.fix_zeros()
    assert zeros(pruner) == 0


def test_one_shot_methods_do_not_score_in_eval_mode() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=SNIP())
    pruner.loss(losses(model.eval(), 0))
    assert zeros(pruner) == 0
    loss = pruner.loss(losses(model.train(), 0))
    assert zeros(pruner) == 0  # the masks act from the end of the step on
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert zeros(pruner) == round(0.8 * weights(pruner))


@dataclass(frozen=True)
class Channels(Method):
    """Scores of another number than the weights."""

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return ChannelMasks(layers, target_sparsity, total_steps, Magnitude().schedule)


class ChannelMasks(MaskController):
    def scores(self) -> list[Tensor]:
        return [layer.weight.abs().sum(1) for layer in self.layers]


def test_scores_that_do_not_fit_name_the_layer() -> None:
    pruner = prepare(TwoTasks(), method=Channels())
    with pytest.raises(ValueError, match=r"scores: 'body.weight' has 72 weights .* shape \(12,\)"):
        pruner.fix_zeros()


class NoController(Method):
    def controller(self, *_: Any, **__: Any) -> Any:
        return None

    def config(self) -> dict[str, Any]:
        return {"name": "none", "pair": (1, 2)}


class NoDataclass(Method):
    controller = Channels.controller


@dataclass(frozen=True)
class WithTensor(Channels):
    values: Any = field(default_factory=lambda: torch.ones(1))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (NoController(), "NoController.controller() must return a Controller, got None"),
        (NoDataclass(), "NoDataclass is not a dataclass"),
        (WithTensor(), "WithTensor.values is tensor([1.])"),
        (Magnitude, "got the class Magnitude: pass Magnitude(...)"),
    ],
)
def test_methods_that_cannot_be_are_refused(method: Any, said: str) -> None:
    model = TwoTasks()
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=re.escape(said)):
        prepare(model, method=method)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("method", ["adaptive", Paper(start=-1.0), Magnitude()], ids=str)
@pytest.mark.filterwarnings("ignore:the run ended at a sparsity", "ignore:no weight is left")
def test_every_zero_of_a_finalized_model_is_positive(method: Any) -> None:
    """Also in tensors that are masked piece by piece."""
    model = TwoTasks(30_000)
    pruner = prepare(model, method=method, total_steps=2, weighting="equal")
    train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=1e-3)), range(2))
    pruner.finalize()
    zero = [weight[weight == 0] for weight in model.parameters()]
    assert sum(map(len, zero)) > 100_000
    assert not any(part.signbit().any() for part in zero)
