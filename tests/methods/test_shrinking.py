"""Baselines with thresholds that shrink, each against its paper's rule in plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Error, raises
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toys import TwoTasks, batch, initialise, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import ST3, STR, Feather, Method, SparsitySchedule
from torch_adapmtl.layers import sampling
from torch_adapmtl.tensor.shapes import PowerThreshold, RescaledThreshold
from torch_adapmtl.tensor.thresholding import SoftThreshold

# Layers of a dozen weights do lose them all: nothing in these methods keeps any.
pytestmark = pytest.mark.filterwarnings("ignore:no weight is left", "ignore:the thresholds of STR")

NAMES = ("body", "heads.a", "heads.b")
STEPS, TARGET = 20, 0.8
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
LATE = SparsitySchedule(start=0.1, end=0.6, fix_at=0.8)
METHODS: dict[str, Method] = {
    "ST-3": ST3(),
    "ST-3, fixed early": ST3(schedule=LATE),
    "Feather": Feather(),
    "Feather, theta": Feather(theta=0.5, power=2),
    "Feather, fixed early": Feather(schedule=LATE),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# All of them; the thresholds of the last follow no schedule.
every = pytest.mark.parametrize(
    "method",
    [*METHODS.values(), STR(start=-1.2, weight_decay=0.2), STR(start=-900, fix_at=1)],
    ids=[*METHODS, "STR", "STR, never learned"],
)
VALUES = st.floats(-1, 1, width=32).map(lambda x: round(x, 3))


def st3(channel: Sequence[float], t: float) -> list[float]:
    """One output channel under ST-3: shrunk, then scaled up by what its pruned weights had."""
    kept = sum(abs(w) for w in channel if abs(w) > t) / len(channel)
    every = sum(abs(w) for w in channel) / len(channel)
    factor = 1.01 / ((kept + 1e-6) / (every + 1e-6) + 0.01)
    return [math.copysign(max(abs(w) - t, 0.0), w) * factor for w in channel]


def feather(channel: Sequence[float], t: float, p: float = 3.0) -> list[float]:
    """Feather: (|w|^p - t^p)^(1/p) above t."""
    return [
        math.copysign((abs(w) ** p - t**p) ** (1 / p), w) if abs(w) > t else 0.0 for w in channel
    ]


def by_channel(rule: Callable[..., list[float]], weight: Tensor, *settings: float) -> Tensor:
    rows = [rule(row, *settings) for row in weight.detach().flatten(1).tolist()]
    return torch.tensor(rows, dtype=weight.dtype).view(weight.shape)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, float, Tensor]:
    """A weight, a threshold that some of its magnitudes equal, and a gradient."""
    shape = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    values = draw(st.lists(VALUES, min_size=math.prod(shape), max_size=math.prod(shape)))
    weight = torch.tensor(values, dtype=torch.float64).view(shape)
    t = draw(st.sampled_from([abs(v) for v in values if v] or [0.1]) | st.floats(1e-3, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return weight, t, torch.randn(shape, dtype=torch.float64, generator=generator)


def applied(threshold: SoftThreshold, problem: tuple[Tensor, float, Tensor]) -> tuple[Tensor, ...]:
    """The sparse weight, and the gradient of the weight."""
    weight, t, gradient = problem
    threshold.to(torch.float64).set_threshold(t)
    weight = weight.clone().requires_grad_()
    sparse = threshold(weight)
    sparse.backward(gradient)
    assert weight.grad is not None
    return sparse.detach(), weight.grad


@given(problems())
def test_st3_shrinks_and_rescales_and_passes_the_whole_gradient(problem: Any) -> None:
    sparse, gradient = applied(RescaledThreshold(), problem)
    weight, t, given_gradient = problem
    torch.testing.assert_close(sparse, by_channel(st3, weight, t), rtol=1e-9, atol=1e-12)
    assert torch.equal(sparse == 0, weight.abs() <= t)
    assert torch.equal(gradient, given_gradient)


@given(problems(), st.sampled_from([1.0, 2.0, 3.0, 4.5]), st.sampled_from([0.0, 0.5, 1.0]))
def test_feather_raises_to_powers_and_scales_the_gradients_of_pruned_weights(
    problem: Any, p: float, theta: float
) -> None:
    sparse, gradient = applied(PowerThreshold(p, theta), problem)
    weight, t, given_gradient = problem
    torch.testing.assert_close(sparse, by_channel(feather, weight, t, p), rtol=1e-6, atol=1e-9)
    assert torch.equal(sparse == 0, weight.abs() <= t)
    scale = torch.where(weight.abs() > t, 1.0, theta)
    assert torch.equal(gradient, given_gradient * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_small_and_large_weights_in_every_dtype(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1e-5, -3e-5, 2e-5], [100.0, -300.0, 200.0]], dtype=dtype)
    for threshold, rule in ((RescaledThreshold(), st3), (PowerThreshold(3.0, 1.0), feather)):
        for row in range(2):
            t = threshold.to(dtype)
            t.set_threshold(float(weight[row, 0].abs()))
            own = weight[row : row + 1].double()
            expected = by_channel(rule, own, float(t.alpha.double()))
            # The smallest float16 numbers are only three times as large as their spacing.
            rtol = {torch.float16: 4e-2, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
            found = t(weight[row : row + 1]).double()
            torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-7)


def test_st3_makes_up_for_the_magnitude_that_pruning_takes_from_a_channel() -> None:
    """As published: a factor of 1 with nothing pruned, and below 101 with nearly all of it."""
    weight = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    threshold = RescaledThreshold(2.0)
    found = threshold(weight)
    torch.testing.assert_close(found[0], torch.ones(4))  # nothing pruned: only shrunk
    assert found[1, 3].item() == pytest.approx(1.01 / 0.51)  # half of the magnitude is left
    assert not found[2].any()
    few = torch.full((1, 10_000), 1.0)
    few[0, 0] = 3.0
    assert 95 < threshold(few)[0, 0].item() < 101


def test_autocast_functorch_and_a_graph_of_gradients() -> None:
    weight = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    for threshold in (RescaledThreshold(0.7), PowerThreshold(3.0, 0.5)):
        threshold.set_threshold(0.7)
        (gradient,) = torch.autograd.grad(threshold(weight).square().sum(), weight)
        found = torch.func.grad(lambda w, f=threshold: f(w).square().sum())(weight.detach())
        assert torch.equal(found, gradient)


# --- a whole run ----------------------------------------------------------------------------------


class Plain:
    """A net that computes with a rule's weights, and is trained straight through."""

    def __init__(self, model: TwoTasks, method: Any, target: float) -> None:
        self.model, self.method, self.target = copy.deepcopy(model), method, target
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.t = 0.0
        self.count = sum(self.weight(name).numel() for name in NAMES)
        self.fixed: dict[str, Tensor] | None = None

    def weight(self, name: str) -> Tensor:
        return self.model.get_parameter(f"{name}.weight")

    def sparse(self, name: str) -> Tensor:
        dense = self.weight(name).detach()
        if self.fixed is not None:
            return dense * self.fixed[name]
        if self.t == 0:
            return dense.clone()
        if isinstance(self.method, ST3):
            return by_channel(st3, dense, self.t)
        return by_channel(feather, dense, self.t, self.method.power)

    def scale(self, name: str) -> Tensor:
        if self.fixed is not None:
            return self.fixed[name]
        theta = getattr(self.method, "theta", None)
        theta = 1.0 if theta is None or self.t == 0 else theta
        return torch.where(self.weight(name).abs() > self.t, 1.0, theta)

    def step(self, step: int) -> None:
        x, targets = batch(step)
        seen = {name: self.sparse(name).requires_grad_() for name in NAMES}
        bias = {name: self.model.get_parameter(f"{name}.bias") for name in NAMES}
        h = nn.functional.linear(x, seen["body"], bias["body"]).tanh()
        loss = torch.zeros(())
        for task, y in targets.items():
            name = f"heads.{task}"
            loss = loss + (nn.functional.linear(h, seen[name], bias[name]) - y).square().mean()
        loss.backward()
        for name in NAMES:
            self.weight(name).grad = seen[name].grad * self.scale(name)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def move(self, count: int) -> None:
        """The threshold becomes the largest of so many of the smallest magnitudes."""
        every = torch.cat([self.weight(name).detach().abs().flatten() for name in NAMES])
        self.t = float(every.sort().values[count - 1]) if count else 0.0

    @torch.no_grad()
    def fix(self) -> None:
        self.move(round(self.target * self.count))
        sparse = {name: self.sparse(name) for name in NAMES}
        for name in NAMES:
            self.weight(name).copy_(sparse[name])
        self.fixed = {name: (sparse[name] != 0).float() for name in NAMES}


@methods
def test_equals_the_plain_version_at_every_step(method: Any) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    plain = Plain(model, method, TARGET)
    pruner = prepare(
        model, method=method, target_sparsity=TARGET, total_steps=STEPS, weighting="equal"
    )
    optimizer = torch.optim.SGD(pruner.param_groups(**SGD))
    fix_step = math.ceil(method.schedule.fix_at * STEPS)
    returned = 0
    for step in range(1, STEPS + 1):
        before = {name: plain.sparse(name) == 0 for name in NAMES}
        plain.step(step)
        if step < fix_step:
            plain.move(math.ceil(method.schedule(step, STEPS, TARGET, 0.0) * plain.count))
        elif step == fix_step:
            plain.fix()
        train(model, pruner, optimizer, [step])
        for name in NAMES:
            found = model.get_submodule(name).weight
            torch.testing.assert_close(found, plain.sparse(name), rtol=1e-4, atol=1e-5)
            assert torch.equal(found == 0, plain.sparse(name) == 0)
            returned += int((before[name] & (found != 0)).sum())
    assert returned > 0  # pruned weights do learn
    assert zeros(pruner) == round(TARGET * weights(pruner))


@every
@pytest.mark.parametrize("how", ["usual", "zero", "constant", "coarse", "two scales"])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.97])
def test_the_zeros_are_exact_and_stay_after_finalize(
    method: Method, how: str, target: float
) -> None:
    model = TwoTasks()
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    initialise(model, how)
    options: Any = {"target_sparsity": target, "total_steps": STEPS, "keep_zeros": False}
    pruner = prepare(model, method=method, **options)
    optimizer = torch.optim.SGD(pruner.param_groups(**SGD))
    train(model, pruner, optimizer, range(STEPS))
    wanted, x = round(target * weights(pruner)), batch(99)[0]
    with torch.no_grad():
        before = model(x)
    assert zeros(pruner) == wanted
    assert pruner.finalize() is model
    assert zeros(pruner) == wanted
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    with torch.no_grad():
        assert all(torch.equal(before[task], out) for task, out in model(x).items())


@every
@pytest.mark.parametrize("at", [1, 11, 17, STEPS])
def test_a_run_resumes_bit_for_bit(method: Method, at: int) -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    fresh = TwoTasks()
    pruner = prepare(model, method=method)
    optimizer = torch.optim.SGD(pruner.param_groups(**SGD))
    train(model, pruner, optimizer, range(at))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, pruner, optimizer, range(at, STEPS))
    other = prepare(fresh, method=method)
    again = torch.optim.SGD(other.param_groups(**SGD))
    fresh.load_state_dict(state[0])
    again.load_state_dict(state[1])
    train(fresh, other, again, range(at, STEPS))
    found = tensors(fresh)
    assert all(torch.equal(found[name], value) for name, value in tensors(model).items())
    found = tensors(other.finalize())
    assert all(torch.equal(found[key], value) for key, value in tensors(pruner.finalize()).items())


@methods
def test_fixing_the_zeros_early_writes_what_the_model_computes_with(method: Method) -> None:
    """The threshold is moved to the target, so that masks and threshold agree."""
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model, method=method)
    train(model, pruner, torch.optim.SGD(pruner.param_groups(**SGD)), range(8))
    plain = Plain(TwoTasks(), method, TARGET)
    with torch.no_grad():
        for name in NAMES:
            plain.weight(name).copy_(
                model.get_submodule(name).parametrizations.weight.original  # the dense weight
            )
    plain.fix()
    pruner.fix_zeros()
    assert zeros(pruner) == round(TARGET * weights(pruner))
    for name in NAMES:
        torch.testing.assert_close(
            model.get_submodule(name).weight, plain.sparse(name), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", ["ST-3", "Feather"])
def test_a_large_model_is_sampled_and_ends_exactly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE", 4096)
    model = TwoTasks(1500)
    pruner = prepare(model, method=METHODS[name])
    optimizer = torch.optim.SGD(pruner.param_groups(lr=1e-3))
    train(model, pruner, optimizer, range(15))
    assert abs(pruner.sparsity() - TARGET) < 0.03
    assert pruner.sparsity() != TARGET
    train(model, pruner, optimizer, range(15, STEPS))
    assert zeros(pruner) == round(TARGET * weights(pruner))


@pytest.mark.parametrize(
    ("theta", "target", "expected"), [(None, 0.95, 1.0), (None, 0.96, 0.5), (0.7, 0.96, 0.7)]
)
def test_theta_follows_the_target(theta: float | None, target: float, expected: float) -> None:
    pruner = prepare(TwoTasks(), method=Feather(theta=theta), target_sparsity=target)
    assert [layer.threshold.theta for layer in pruner.layers] == [expected] * 3


@every
def test_a_model_is_copied_during_a_run(method: Method) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=method)
    train(model, pruner, torch.optim.SGD(pruner.param_groups(**SGD)), range(12))
    other, x = copy.deepcopy(model), batch(99)[0]
    assert parametrize.is_parametrized(other.body)
    assert all(torch.equal(out, other(x)[task]) for task, out in model(x).items())
    other.adapmtl.fix_zeros()
    assert zeros(other.adapmtl) == round(TARGET * weights(pruner))
    assert not pruner.zeros_fixed


@pytest.mark.parametrize(
    ("make", "error", "named", "found", "remedy"),
    [
        (lambda: ST3(schedule="cubic"), TypeError, "schedule", "'cubic'", "SparsitySchedule("),
        (lambda: Feather(schedule=1), TypeError, "schedule", "got 1", "SparsitySchedule("),
        (lambda: Feather(power=0.5), ValueError, "method: power", "got 0.5", ">= 1"),
        (lambda: Feather(power=math.inf), ValueError, "method: power", "got inf", "finite"),
        (lambda: Feather(power="3"), TypeError, "method: power", "'3'", "be a number"),
        (lambda: Feather(theta=1.5), ValueError, "method: theta", "got 1.5", "in [0, 1]"),
        (lambda: STR(start=math.nan), ValueError, "method: start", "got nan", "finite"),
        (lambda: STR(weight_decay=-1), ValueError, "method: weight_decay", "got -1.0", ">= 0"),
        (lambda: STR(fix_at=1.5), ValueError, "method: fix_at", "got 1.5", "fraction of"),
        (lambda: STR(start="x"), TypeError, "method: start", "'x'", "be a number"),
        (lambda: Feather(theta="x"), TypeError, "method: theta", "'x'", "be a number"),
    ],
)
def test_refused(make: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(make, error, named, found, remedy)


@every
def test_more_zeros_than_the_target_asks_for_are_refused(method: Method) -> None:
    model = TwoTasks()
    with torch.no_grad():
        model.body.weight[:10] = 0
    do = lambda: prepare(model, method=method, target_sparsity=0.2)  # noqa: E731
    raises(do, ValueError, "target_sparsity=0.2", "hold 60", "raise the target")


@every
def test_zeros_that_are_kept_count_and_stay(method: Method) -> None:
    model = TwoTasks()
    with torch.no_grad():
        model.body.weight[:4] = 0
    pruner = prepare(model, method=method, target_sparsity=0.5)
    train(model, pruner, torch.optim.SGD(pruner.param_groups(**SGD)), range(STEPS))
    assert not model.body.weight[:4].any()
    assert zeros(pruner) == round(0.5 * weights(pruner))


def test_losses_reach_pruned_weights() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=ST3())
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(8))
    pruner.loss(losses(model, 8)).backward()
    gone = model.heads["a"].weight == 0
    assert gone.any()
    assert model.heads["a"].parametrizations.weight.original.grad[gone].all()


# --- STR ------------------------------------------------------------------------------------------


class PlainSTR:
    """STR in plain tensors, whose gradients are those of autograd; cut by magnitudes over alpha."""

    def __init__(self, model: TwoTasks, method: STR) -> None:
        self.model = copy.deepcopy(model)
        self.s = {name: torch.tensor(method.start, requires_grad=True) for name in NAMES}
        self.masks: dict[str, Tensor] | None = None
        self.optimizer = torch.optim.SGD(
            [
                {"params": list(self.model.parameters()), **SGD},
                {"params": list(self.s.values()), **SGD, "weight_decay": method.weight_decay},
            ]
        )

    def sparse(self, name: str) -> Tensor:
        weight = self.model.get_parameter(f"{name}.weight")
        if self.masks is not None:
            return weight * self.masks[name]
        return weight.sign() * (weight.abs() - self.s[name].sigmoid()).relu()

    def step(self, step: int) -> None:
        x, targets = batch(step)
        bias = {name: self.model.get_parameter(f"{name}.bias") for name in NAMES}
        h = nn.functional.linear(x, self.sparse("body"), bias["body"]).tanh()
        loss = torch.zeros(())
        for task, y in targets.items():
            name = f"heads.{task}"
            output = nn.functional.linear(h, self.sparse(name), bias[name])
            loss = loss + (output - y).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def cut(self, count: int) -> None:
        parameters = {name: self.model.get_parameter(f"{name}.weight") for name in NAMES}
        scores = {name: w.abs() / self.s[name].sigmoid() for name, w in parameters.items()}
        level = torch.cat([score.flatten() for score in scores.values()]).sort().values[count - 1]
        sparse = {name: self.sparse(name) for name in NAMES}
        self.masks = {name: (score > level).float() for name, score in scores.items()}
        for name, w in parameters.items():
            w.copy_(sparse[name] * self.masks[name])


@pytest.mark.parametrize("start", [-2.0, -1.2], ids=["too little", "too much"])
def test_str_equals_the_plain_version_at_every_step(start: float) -> None:
    """Before the cut to the target, at it, and after it."""
    torch.manual_seed(0)
    method = STR(start=start, weight_decay=0.02, fix_at=0.8)
    model = TwoTasks()
    plain = PlainSTR(model, method)
    pruner = prepare(model, method=method, total_steps=STEPS, weighting="equal")
    optimizer = torch.optim.SGD(pruner.param_groups(**SGD))
    wanted = round(TARGET * weights(pruner))
    for step in range(1, STEPS + 1):
        plain.step(step)
        train(model, pruner, optimizer, [step])
        if step == 16:
            outcome = sum(int((plain.sparse(name) == 0).sum()) for name in NAMES)
            assert (outcome < wanted) == (start == -2.0)
            assert outcome != wanted
            plain.cut(wanted)
        for i, name in enumerate(NAMES):
            found = model.get_submodule(name).weight
            torch.testing.assert_close(found, plain.sparse(name), rtol=1e-4, atol=1e-5)
            if step < 16:
                s = pruner.controller.s.values[i]
                torch.testing.assert_close(s, plain.s[name].detach(), rtol=1e-5, atol=1e-6)
        gone = sum(int((plain.sparse(name) == 0).sum()) for name in NAMES)
        # Weights that return at the cut are zero in plain numbers until their first step.
        assert zeros(pruner) == (wanted if step >= 16 else gone)
    assert len({s.item() for s in plain.s.values()}) == 3


def test_str_that_learned_nothing_is_global_magnitude_pruning_and_says_so() -> None:
    model = TwoTasks()
    pruner = prepare(model, method=STR())
    assert not pruner.controller.thresholds().any()
    every = torch.cat([model.get_submodule(name).weight.abs().flatten() for name in NAMES])
    with pytest.warns(UserWarning, match=r"STR had pruned 0.00% .* 79.76%, far less.*raise STR's"):
        pruner.fix_zeros()
    found = torch.cat([model.get_submodule(name).weight.flatten() for name in NAMES])
    assert torch.equal(found != 0, every > every.sort().values[134 - 1])


def test_str_that_pruned_far_too_much_says_so() -> None:
    pruner = prepare(TwoTasks(), method=STR(start=5.0), target_sparsity=0.5)
    with pytest.warns(UserWarning, match=r"had pruned 100.00% .* 50.00%, far more.*lower STR's"):
        pruner.fix_zeros()
    assert zeros(pruner) == 84
