"""The paper's own mechanism, step by step against a plain version of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from refusals import Error, assert_refused, raises, running
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import Paper, Pruner


class Plain:
    """AdapMTL as the paper has it, in plain tensors, for a shared body and two heads."""

    def __init__(self, model: TwoTasks, start: float) -> None:
        self.weight = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.s = {name: torch.tensor(start, requires_grad=True) for name in ("shared", "a", "b")}
        self.component = {"body.weight": "shared", "heads.a.weight": "a", "heads.b.weight": "b"}
        self.held: dict[str, Tensor] | None = None

    def sparse(self, name: str) -> Tensor:
        weight = self.weight[name]
        if name not in self.component:
            return weight
        alpha = self.s[self.component[name]].sigmoid()
        return weight.sign() * (weight.abs() - alpha).relu()

    def loss(self, step: int) -> Tensor:
        x, targets = batch(step)
        h = nn.functional.linear(x, self.sparse("body.weight"), self.weight["body.bias"]).tanh()
        total = torch.zeros(())
        for task, target in targets.items():
            weight, bias = self.sparse(f"heads.{task}.weight"), self.weight[f"heads.{task}.bias"]
            total = total + (nn.functional.linear(h, weight, bias) - target).square().mean()
        return total

    def zeros(self) -> int:
        return sum(int((self.sparse(name) == 0).sum()) for name in self.component)

    @torch.no_grad()
    def after_step(self, wanted: int) -> None:
        """Thresholds stay as they were when the target was reached."""
        if self.held is not None:
            for name, s in self.s.items():
                s.copy_(self.held[name])
        elif self.zeros() >= wanted:
            self.held = {name: s.detach().clone() for name, s in self.s.items()}


METHOD = Paper(start=-6.0, weight_decay=0.5)
ADAM: dict[str, Any] = {"lr": 2e-2, "betas": (0.5, 0.999), "weight_decay": 1e-3}


def _paper(model: nn.Module, **options: Any) -> Pruner:
    options = {"target_sparsity": 0.2, "total_steps": 400, "method": METHOD, **options}
    return prepare(model, weighting="equal", **options)


def score(pruner: Pruner, component: str) -> Tensor:
    """The trained number s of a component."""
    return pruner.controller.s.values[pruner.layers.components.index(component)]


def test_equals_the_plain_version_at_every_step() -> None:
    model = TwoTasks()
    plain = Plain(model, start=-6.0)
    pruner = _paper(model)
    optimizer = torch.optim.Adam(pruner.param_groups(threshold_lr=5e-2, **ADAM))
    reference = torch.optim.Adam(
        [
            {"params": list(plain.weight.values()), **ADAM},
            {"params": list(plain.s.values()), **ADAM, "lr": 5e-2, "weight_decay": 0.5},
        ]
    )
    wanted = round(0.2 * weights(pruner))
    reached = 0
    for step in range(150):
        train(model, pruner, optimizer, [step])
        plain.loss(step).backward()
        reference.step()
        reference.zero_grad()
        plain.after_step(wanted)

        for name, module in (("body", model.body), *model.heads.named_children()):
            key = name if name == "body" else f"heads.{name}"
            original = module.parametrizations.weight.original
            torch.testing.assert_close(
                original, plain.weight[f"{key}.weight"], rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                module.weight, plain.sparse(f"{key}.weight"), rtol=1e-5, atol=1e-6
            )
        for name, s in plain.s.items():
            torch.testing.assert_close(score(pruner, name), s, rtol=1e-6, atol=1e-6)
        assert zeros(pruner) == plain.zeros()
        assert bool(pruner.controller.reached) == (plain.held is not None)
        reached += plain.held is not None
    assert 10 < reached < 140  # the test is about before and after
    assert zeros(pruner) >= wanted
    assert len({s.item() for s in plain.s.values()}) == 3


def test_thresholds_are_the_sigmoid_and_rise_by_decay_alone() -> None:
    model = TwoTasks()
    pruner = _paper(model, target_sparsity=0.9, method=Paper(start=-3.0, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    s = pruner.controller.s.values.requires_grad_()
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.5)[1:])
    for _ in range(3):
        s.grad = torch.zeros(3)
        optimizer.step()
        pruner.step()
    assert s.tolist() == pytest.approx([-3.0 * (1 - 0.5 * 0.1) ** 3] * 3)
    assert torch.equal(pruner.controller.thresholds(), s.detach().sigmoid())


@pytest.mark.parametrize(
    ("settings", "learns"),
    [({}, False), ({"gradient": "mask"}, False), ({"gradient": "straight_through"}, True)],
    ids=str,
)
def test_pruned_weights_learn_only_if_told_to(settings: Any, learns: bool) -> None:
    model = TwoTasks()
    pruner = _paper(model, method=Paper(start=-1.5, **settings))
    pruner.loss(losses(model, 0)).backward()
    gone = model.heads["a"].weight == 0
    grad = model.heads["a"].parametrizations.weight.original.grad
    assert gone.any()
    assert bool(grad[gone].any()) == learns
    assert grad[~gone].any()


def test_ends_with_what_it_has_reached() -> None:
    model = TwoTasks()
    keys = list(model.state_dict())
    pruner = _paper(model, target_sparsity=0.9)
    optimizer = torch.optim.Adam(pruner.param_groups(threshold_lr=5e-2, **ADAM))
    train(model, pruner, optimizer, range(60))
    found, x = zeros(pruner), batch(99)[0]
    before = model(x)
    with pytest.raises(RuntimeError, match="method='paper' does not do: call finalize"):
        pruner.fix_zeros()
    with pytest.warns(
        UserWarning, match="ended at a sparsity of .*, not 90.00%: method='paper' raises"
    ):
        assert pruner.finalize() is model
    assert zeros(pruner) == found < round(0.9 * weights(pruner))
    assert list(model.state_dict()) == keys
    assert all(torch.equal(before[task], out) for task, out in model(x).items())


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_a_target_that_was_passed_by_far_is_told(target: float) -> None:
    model = TwoTasks()
    pruner = _paper(model, target_sparsity=target, method=Paper(start=-1.0))
    optimizer = torch.optim.Adam(pruner.param_groups(threshold_lr=5e-2, **ADAM))
    train(model, pruner, optimizer, range(5))
    assert zeros(pruner) > (target + 0.01) * weights(pruner)
    with pytest.warns(UserWarning, match=f"not {target:.2%}: .* Lower Paper's start"):
        pruner.finalize()


def test_state_resumes_bit_for_bit() -> None:
    model = TwoTasks()
    fresh = copy.deepcopy(model)
    pruner = _paper(model)
    optimizer = torch.optim.Adam(pruner.param_groups(threshold_lr=5e-2, **ADAM))
    train(model, pruner, optimizer, range(50))
    assert not pruner.controller.reached
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, pruner, optimizer, range(50, 150))
    assert pruner.controller.reached

    other = _paper(fresh)
    again = torch.optim.Adam(other.param_groups(threshold_lr=5e-2, **ADAM))
    fresh.load_state_dict(state[0])
    again.load_state_dict(state[1])
    train(fresh, other, again, range(50, 150))
    found, expected = tensors(fresh), tensors(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_target_zero_holds_the_start() -> None:
    model = TwoTasks()
    pruner = _paper(model, target_sparsity=0.0)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(1))
    after_one = score(pruner, "a").item()
    train(model, pruner, optimizer, range(1, 5))
    assert score(pruner, "a").item() == after_one


def test_a_start_may_be_an_integer() -> None:
    found = [_paper(TwoTasks(), method=Paper(start=start)) for start in (-3, -3.0)]
    assert torch.equal(found[0].controller.thresholds(), found[1].controller.thresholds())


@pytest.mark.parametrize(
    ("options", "error", "named", "found", "remedy"),
    [
        ({"start": float("inf")}, ValueError, "start", "got inf", "finite"),
        ({"start": "low"}, TypeError, "start", "'low'", "be a number"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay", "got -1.0", ">= 0"),
        ({"weight_decay": "x"}, TypeError, "weight_decay", "'x'", "be a number"),
        ({"gradient": "none"}, ValueError, "gradient", "'none'", "'straight_through', 'mask'"),
    ],
    ids=str,
)
def test_refused(options: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: Paper(**options), error, f"method: {named}", found, remedy)


def test_fixing_its_zeros_is_refused() -> None:
    do = lambda scene: scene.pruner.fix_zeros()  # noqa: E731
    assert_refused(
        running("", do, RuntimeError, "fix_zeros()", "method='paper'", "call finalize()",
                options={"method": "paper"}, goes_on=False)
    )  # fmt: skip
