"""What is pruned is what the model computes with, whatever is done to the model during a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from toys import TwoTasks, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import Adaptive, Magnitude, Pruner, SparsitySchedule, apply_adapmtl


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def started(steps: int, **options: Any) -> tuple[TwoTasks, Pruner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, **options)
    optimizer = sgd(model)
    train(model, pruner, optimizer, range(steps))
    return model, pruner, optimizer


def share_of_zeros(model: TwoTasks) -> float:
    used = [model.body.weight, *(head.weight for head in model.heads.values())]
    return sum(int((w == 0).sum()) for w in used) / sum(w.numel() for w in used)


# --- the model is changed during a run ------------------------------------------------------------


def replace(model: TwoTasks) -> None:
    model.heads["a"] = nn.Linear(12, 5)


def widen(model: TwoTasks) -> None:
    model.heads["a"] = nn.Linear(12, 9)


def remove(model: TwoTasks) -> None:
    del model.heads["a"]


def swap_for_a_copy(model: TwoTasks) -> None:  # as some tools for quantisation do
    model.body = copy.deepcopy(model.body)


def mask(model: TwoTasks) -> None:
    prune.random_unstructured(model.body, "weight", 0.5)


def drop(model: TwoTasks) -> None:
    del model.body.weight


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (replace, "heads.a.weight", "no longer in the model"),
        (widen, "heads.a.weight", "no longer in the model"),
        (remove, "heads.a.weight", "no longer in the model"),
        (swap_for_a_copy, "body.weight", "no longer in the model"),
        (mask, "body.weight", "masked by torch.nn.utils.prune"),
        (drop, "body.weight", "no longer a parameter"),
    ],
)
@pytest.mark.parametrize(
    "look",
    [
        lambda pruner: pruner.sparsity(),
        lambda pruner: pruner.report(),
        lambda pruner: pruner.fix_zeros(),
        lambda pruner: [pruner.step() for _ in range(5)],
    ],
)
def test_a_layer_that_the_model_has_lost_is_named(
    change: Callable[[TwoTasks], None], name: str, said: str, look: Callable[[Pruner], object]
) -> None:
    model, pruner, _ = started(8)
    change(model)
    with pytest.raises(RuntimeError, match=rf"'{name}' .*{said}"):
        look(pruner)
    assert pruner.undo() is model  # which is the remedy that the error names


def test_finalize_looks_too() -> None:
    model, pruner, _ = started(20)
    replace(model)
    with pytest.raises(RuntimeError, match=r"'heads\.a\.weight' .*no longer in the model"):
        pruner.finalize()


def test_a_module_that_takes_over_the_parameter_is_pruned_on() -> None:
    model, pruner, optimizer = started(8)
    taken = nn.Linear(6, 12)
    taken.weight, taken.bias = model.body.weight, model.body.bias
    model.body = taken
    train(model, pruner, optimizer, range(8, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_and_unfreezing_is_warned_of(frozen: bool) -> None:
    model = TwoTasks()
    model.body.requires_grad_(not frozen)
    pruner = prepare(model)
    optimizer = sgd(model)
    train(model, pruner, optimizer, range(5))
    model.body.requires_grad_(frozen)
    end = "trained now, but dense.*groups=" if frozen else "is pruned, but"

    def train_on() -> None:
        train(model, pruner, optimizer, range(5, 20))
        pruner.finalize()

    with pytest.warns(UserWarning, match=rf"'body\.weight' .*{end}") as found:
        train_on()
    assert len([w for w in found if "body.weight" in str(w.message)]) == 1  # once


def test_weights_may_be_frozen_before_the_schedule_starts() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=Adaptive(schedule=SparsitySchedule(start=0.5, end=0.7)))
    model.body.requires_grad_(False)
    optimizer = sgd(model)
    train(model, pruner, optimizer, range(9))
    model.body.requires_grad_(True)
    train(model, pruner, optimizer, range(9, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


def test_groups_that_stay_frozen_are_warned_of() -> None:
    model = TwoTasks()
    model.body.requires_grad_(False)
    groups = {"shared": ["body"], "a": ["heads.a"], "b": ["heads.b"]}
    pruner = prepare(model, groups=groups)
    with pytest.warns(UserWarning, match=r"'body\.weight' is pruned, but has requires_grad=False"):
        train(model, pruner, sgd(model), range(20))


def test_mostly_frozen_models_are_warned_of_and_groups_prune_them() -> None:
    def backbone_frozen() -> TwoTasks:
        model = TwoTasks(64)
        model.heads["a"], model.heads["b"] = nn.Linear(64, 5), nn.Linear(64, 3)
        model.body = nn.Linear(6, 64)
        model.body.requires_grad_(False)
        model.heads["b"].requires_grad_(False)
        return model

    with pytest.warns(UserWarning, match=r"most of the prunable weights are frozen.*groups="):
        prepare(backbone_frozen())
    model = backbone_frozen()
    groups = {"shared": ["body"], "a": ["heads.a"], "b": ["heads.b"]}
    pruner = prepare(model, groups=groups)
    optimizer = sgd(model)
    train(model, pruner, optimizer, range(1))
    model.requires_grad_(True)
    train(model, pruner, optimizer, range(1, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 896) / 896


def test_layers_that_are_added_are_warned_of() -> None:
    model, pruner, optimizer = started(3)
    model.more = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"'more\.weight' is in the model, but was not"):
        train(model, pruner, optimizer, range(3, 20))


class Experts(TwoTasks):
    """Uses one of several experts, at random, in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        h = self.experts[int(torch.randint(6, ()))](h).tanh()
        return {task: head(h) for task, head in self.heads.items()}


class Warmup(TwoTasks):
    """Trains its body only later."""

    warm = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        h = h if self.warm else h.detach()
        return {task: head(h) for task, head in self.heads.items()}


def test_experts_that_were_not_chosen_at_first_are_warned_of_once() -> None:
    model = Experts()
    pruner = prepare(model)
    assert len(pruner.components["unused"]) in (4, 5)  # it ran in train mode and in eval mode

    def train_on() -> None:
        train(model, pruner, sgd(model), range(20))

    with pytest.warns(
        UserWarning, match=r"'experts\.\d\.weight' is trained, but .*groups="
    ) as found:
        train_on()
    assert len(found) == 1


@pytest.mark.parametrize(
    "options", [{"groups": {"shared": ["experts"]}}, {"exclude": ["experts"]}, {}], ids=str
)
def test_experts_that_are_named_are_pruned_or_left_out(options: Any) -> None:
    model = Experts()
    pruner = prepare(model, **options)
    if not options:
        pruner.undo()  # which ends the warning too
        sum(losses(model, 0).values()).backward()
        sgd(model).step()
        pruner = prepare(model, groups={"shared": ["experts"]})
    train(model, pruner, sgd(model), range(20))
    pruner.finalize()
    experts = torch.stack([expert.weight.detach() for expert in model.experts])
    zeros_in_experts = int((experts == 0).sum())
    if "exclude" in options:
        assert zeros_in_experts == 0
        assert share_of_zeros(model) == round(0.8 * 168) / 168
    else:
        assert zeros_in_experts + 168 * share_of_zeros(model) == round(0.8 * (864 + 168))


def test_a_part_that_is_cut_off_at_first_is_warned_of() -> None:
    model = Warmup()
    pruner = prepare(model)
    optimizer = sgd(model)
    train(model, pruner, optimizer, range(5))
    model.warm = True
    with pytest.warns(UserWarning, match=r"'body\.weight' is trained, but .*groups="):
        train(model, pruner, optimizer, [5])


class LowRank(nn.Module):
    """Adds a low-rank update, which is zero at first."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(out_features, 1))
        self.down = nn.Parameter(torch.randn(1, in_features))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Scale(nn.Module):
    """Scales each row."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(out_features, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


METHODS = [Adaptive(), Magnitude(), Adaptive(allocation="gradient")]


@pytest.mark.parametrize("steps", [1, 8, 19])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_parametrization_that_does_not_keep_zeros_is_refused_until_it_is_removed(
    method: Any, steps: int
) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=method)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(steps))
    parametrize.register_parametrization(model.body, "weight", LowRank(12, 6))
    looks = [pruner.sparsity, pruner.report, pruner.fix_zeros, pruner.finalize]
    if steps < 18:  # then the zeros are fixed, and finalize looks again
        looks.append(pruner.step)
    for look in looks:
        with pytest.raises(RuntimeError, match=r"'body\.weight' is computed by LowRank .* remove"):
            look()
    if method == METHODS[-1]:
        return  # its threshold is a parametrization, and would be removed too
    parametrize.remove_parametrizations(model.body, "weight", leave_parametrized=False)
    train(model, pruner, optimizer, range(steps, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


def put_scale_on(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Scale(12, 6))


@pytest.mark.parametrize("put_on", [put_scale_on, parametrizations.spectral_norm])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.filterwarnings("ignore:'body.parametrizations.weight.* is in the model, but was not")
def test_a_parametrization_that_keeps_zeros_may_be_registered_in_a_run(
    method: Any, put_on: Callable[[nn.Module], object]
) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=method)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(8))
    put_on(model.body)
    state = tensors(model)
    pruner.report()
    assert all(torch.equal(value, state[name]) for name, value in tensors(model).items())
    train(model, pruner, optimizer, range(8, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


# --- the weight of a layer is its parameter -------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 8, 15, 19, 20])
@pytest.mark.parametrize("method", [Adaptive(), Magnitude()], ids=str)
def test_the_weight_is_the_same_parameter_from_the_first_step_to_the_last(
    steps: int, method: Any
) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    before = model.body.weight
    pruner = prepare(model, method=method)
    train(model, pruner, sgd(model), range(steps))
    assert model.body.weight is before
    assert before.is_leaf
    assert type(model.body) is nn.Linear
    total = sum(losses(model, 0).values())
    (gradient,) = torch.autograd.grad(total, model.body.weight, retain_graph=True)
    assert gradient.any()
    seen: list[Tensor] = []
    model.body.weight.register_hook(seen.append)
    total.backward()
    assert torch.equal(seen[0], gradient)
    assert model.body.weight.grad is not None
    torch.optim.SGD([model.body.weight], lr=0.1)


@pytest.mark.parametrize("steps", [0, 8, 15, 20])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: nn.init.constant_(w, 0.25),
        lambda w: w.data.fill_(0.25),
        lambda w: w.data.copy_(torch.full_like(w, 0.25)),
        lambda w: setattr(w, "data", torch.full_like(w, 0.25)),
    ],
)
def test_what_is_written_to_a_weight_takes_effect(
    write: Callable[[nn.Parameter], object], steps: int
) -> None:
    model, pruner, optimizer = started(steps)
    model.body.bias.data.zero_()
    write(model.body.weight)
    x = torch.ones(1, 6)
    torch.testing.assert_close(model.body(x), torch.full((1, 12), 1.5))
    train(model, pruner, optimizer, range(steps, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


@pytest.mark.parametrize("fix_at", [None, 0.5])
def test_a_low_rank_update_that_is_merged_and_taken_out_again(fix_at: float | None) -> None:
    model, pruner, optimizer = started(15, schedule=SparsitySchedule(end=0.4, fix_at=fix_at))
    before, count = model.body.weight.detach().clone(), zeros(pruner)
    delta = torch.randn(12, 1) @ torch.randn(1, 6)
    model.body.weight.data += delta  # as LoRA layers do in eval mode
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.body(x), F.linear(x, before + delta, model.body.bias))
    assert pruner.sparsity() == zeros(pruner) / weights(pruner) < count / weights(pruner)
    model.body.weight.data -= delta
    train(model, pruner, optimizer, range(15, 20))
    pruner.finalize()
    assert share_of_zeros(model) == round(0.8 * 168) / 168


def test_groups_picked_by_name_after_the_call_hold_the_pruned_weights() -> None:
    model = TwoTasks()
    prepare(model)
    named = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    assert named == ["body.weight", "heads.a.weight", "heads.b.weight"]


class Cell(nn.Module):
    """Uses each weight twenty times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.a, self.b = nn.GRUCell(6, 12), nn.Linear(12, 5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x.new_zeros(len(x), 12)
        for _ in range(20):
            h = self.cell(x, h)
        return {"a": self.a(h), "b": self.b(h)}


def test_a_weight_that_is_used_many_times_is_made_sparse_once() -> None:
    model = Cell()
    pruner = apply_adapmtl(
        model,
        target_sparsity=0.8,
        total_steps=20,
        example_inputs=torch.ones(2, 6),
        prunable={nn.GRUCell: "weight_*"},
    )
    optimizer = sgd(model)
    for step in range(20):
        versions = [layer.weight._version for layer in pruner.layers]
        total = pruner.loss(losses(model, step))
        assert [layer.weight._version for layer in pruner.layers] == versions  # nothing is computed
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    pruner.finalize()
    used = [p for name, p in model.named_parameters() if "weight" in name]
    count = sum(w.numel() for w in used)
    assert sum(int((w == 0).sum()) for w in used) == round(0.8 * count)
