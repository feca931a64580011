"""Training loops of many kinds, and what a step may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import Adaptive, Magnitude, Paper, Pruner, SparsitySchedule, Taylor

EARLY = SparsitySchedule(start=0.0, end=0.5)


def _final(pruner: Pruner, model: nn.Module) -> dict[str, Tensor]:
    assert zeros(pruner) == round(0.8 * weights(pruner))
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    return tensors(model)


# --- compiled, mixed precision, skipped steps ---------------------------------------------------


@pytest.mark.filterwarnings("ignore:the run ended at a sparsity")  # of a toy, after 20 steps
@pytest.mark.parametrize("compile_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}, {"method": "paper"}], ids=str)
def test_compiled_is_as_eager(options: dict[str, Any], compile_first: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if "method" in options:
        options = {"method": Paper(start=-3.0, weight_decay=0.1), "target_sparsity": 0.3}
    else:
        # Pruned weights learn to the end: whether the one that a threshold lies on does can hang
        # on a last bit, which a compiler may round in its own way.
        schedule = SparsitySchedule(start=0.0, end=0.5, regrow_until=0.9)
        options = {**options, "schedule": schedule}
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TwoTasks()
        run: Any = model
        if compiled and compile_first:
            run = torch.compile(model, backend=backend)
        pruner = prepare(run, **options)
        if compiled and not compile_first:
            run = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
        train(run, pruner, optimizer, range(20))
        x = batch(50)[0]
        outputs = run(x)
        sparse = pruner.sparsity()
        assert pruner.finalize() is model
        again = run(x)
        for task, out in outputs.items():
            torch.testing.assert_close(again[task], out)
        found.append((sparse, tensors(model)))
    (eager, expected), (fast, result) = found
    assert fast == eager
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value)
    # Thresholds that move and masks that come do not make a graph each; finalize makes one.
    assert len(graphs) <= 4


def test_compiled_gradients_follow_whether_pruned_weights_learn() -> None:
    torch.compiler.reset()  # of the other tests' graphs of this model
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = TwoTasks()
    pruner = prepare(model, schedule=SparsitySchedule(start=0.0, end=0.0, regrow_until=0.5))
    pruner.step()
    compiled = torch.compile(model, backend=backend)
    learn = []
    for _ in range(15):
        gradients = []
        for net in (model, compiled):
            model.zero_grad()
            sum(out.square().sum() for out in net(batch(0)[0]).values()).backward()  # type: ignore[union-attr]
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        eager, fast = gradients
        for name, grad in eager.items():
            torch.testing.assert_close(fast[name], grad)
        learn.append(int((eager["body.weight"] == 0).sum()))
        pruner.step()
    assert max(learn[:9]) < min(learn[9:]), learn
    assert len(graphs) == 1


def test_autocast() -> None:
    model = TwoTasks()
    pruner = prepare(model, schedule=EARLY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = losses(model, step)
            loss = pruner.loss(found)
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.controller.offsets.by_layer().any()
    _final(pruner, model)


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity"])
def test_skipped_steps_leave_no_trace(allocation: Any) -> None:
    """A gradient scaler scales the gradient and leaves out the steps where it overflows."""
    found = []
    for scale, skipped in ((1.0, ()), (2.0**16, (3, 9, 18))):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, schedule=EARLY, total_steps=20, allocation=allocation)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            (pruner.loss(losses(model, step)) * scale).backward()
            if step in skipped:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(torch.inf)
            else:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.div_(scale)
                optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        assert all(tensor.isfinite().all() for tensor in pruner.buffers())
        found.append(pruner.controller.offsets.by_layer())
        _final(pruner, model)
    assert found[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:no weight is left")  # of head a, by Taylor
@pytest.mark.parametrize("method", ["adaptive", Taylor(schedule=EARLY)], ids=["adaptive", "Taylor"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_none(fused: bool, method: str | Taylor) -> None:
    """The same run as one without the batches whose gradients overflow."""
    found = []
    overflowing = {0, 3, 4, 11, 17}
    for skipping in (False, True):
        torch.manual_seed(0)
        model = TwoTasks()
        schedule = {"schedule": EARLY} if method == "adaptive" else {}
        pruner = prepare(model, method=method, weighting="equal", **schedule)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
        pruner.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
        for index in range(20 + len(overflowing)):
            if index in overflowing and not skipping:
                continue
            loss = pruner.loss(losses(model, index))
            if index in overflowing:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**4)
            optimizer.zero_grad()
        assert pruner.report().step == 20
        found.append(_final(pruner, model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_saved_state_does_not_count_what_a_fused_optimizer_left_out() -> None:
    """Which only the device knows until the next update."""
    model, fresh = TwoTasks(), TwoTasks()
    pruner = prepare(model, total_steps=500, schedule=EARLY)  # updates are ten steps apart
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
    for index in range(7):
        loss = pruner.loss(losses(model, index))
        scaler.scale(loss * torch.inf if index in (1, 4) else loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**4)
        optimizer.zero_grad()
    assert pruner.report().step == 7
    other = prepare(fresh, total_steps=500, schedule=EARLY)
    fresh.load_state_dict(model.state_dict())
    assert other.report().step == 5
    model.load_state_dict(model.state_dict())
    assert pruner.report().step == 5
    for index in range(7, 13):
        (pruner.loss(losses(model, index))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.report().step == 11


def test_a_scale_changes_nothing() -> None:
    found = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, schedule=EARLY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / scale)
        for step in range(20):
            (pruner.loss(losses(model, step)) * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        found.append(_final(pruner, model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_when_gradients_are_cleared_does_not_matter(set_to_none: bool) -> None:
    found = []
    for early in (True, False):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model, schedule=EARLY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            pruner.loss(losses(model, step)).backward()
            optimizer.step()
            if early:
                optimizer.zero_grad(set_to_none=set_to_none)
            pruner.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert pruner.controller.offsets.by_layer().any()
        found.append(_final(pruner, model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_accumulated_gradients_are_seen_whole() -> None:
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = TwoTasks().double()
        pruner = prepare(
            model, schedule=EARLY, weighting="equal",
            example_inputs=torch.ones(2, 6, dtype=torch.float64),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            x, targets = batch(step)
            for i in range(parts):
                share = slice(8 // parts * i, 8 // parts * (i + 1))
                outputs = model(x[share].double())
                pruner.loss(
                    {t: (outputs[t] - y[share]).square().mean() / parts for t, y in targets.items()}
                ).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        found.append((pruner.controller.offsets.by_layer(), _final(pruner, model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key])


def test_a_closure() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    pruner.attach(optimizer)
    first = None
    for _ in range(20):

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = pruner.loss(losses(model, 0))
            total.backward()
            return total

        value = optimizer.step(closure).item()
        first = value if first is None else first
    assert pruner.report().step == 20
    assert value < first
    _final(pruner, model)


def test_two_optimizers_and_a_task_that_is_often_missing() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=60, schedule=EARLY, allocation="sensitivity")
    body = torch.optim.SGD(model.body.parameters(), lr=0.1)
    heads = torch.optim.Adam(model.heads.parameters(), lr=1e-2)
    pruner.attach(heads)
    for step in range(60):
        found: dict[str, Tensor | None] = dict(losses(model, step))
        if step % 3:
            found["b"] = None
        pruner.loss(found).backward()
        for optimizer in (body, heads):
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.controller.allocator.saliency[1].min() > 0
    _final(pruner, model)


def test_evaluation_under_autocast_keeps_no_copies() -> None:
    """Autocast keeps a cast copy of every leaf that requires grad, until the region ends."""
    model = TwoTasks()
    pruner = prepare(model, schedule=EARLY, allocation="gradient")  # which computes the weights
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(15))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not model.body.weight.requires_grad


# --- weights that are kept elsewhere -------------------------------------------------------------


class Master(torch.optim.Optimizer):
    """Trains copies of the weights and writes them into the weights, in its step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            master = state.setdefault("master", parameter.detach().clone())
            master.sub_(parameter.grad, alpha=0.05)
            parameter.copy_(master)


class Outer(torch.optim.Optimizer):
    """Minimises a function of one vector, as SciPy does, for some iterations in each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]

        def evaluate(vector: Tensor) -> tuple[float, Tensor]:
            nn.utils.vector_to_parameters(vector, parameters)
            with torch.enable_grad():
                value = closure().item()
            return value, nn.utils.parameters_to_vector([p.grad for p in parameters])

        vector = nn.utils.parameters_to_vector(parameters).clone()
        value, gradient = evaluate(vector)
        length = 0.2
        for _ in range(6):
            new = vector - length * gradient
            new_value, new_gradient = evaluate(new)
            if new_value < value:
                vector, value, gradient = new, new_value, new_gradient
            else:
                length /= 2
        nn.utils.vector_to_parameters(vector, parameters)


def test_an_outer_optimiser_may_run_in_a_step() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=40)
    optimizer = Outer(model.parameters())
    seen: list[float] = []

    def closure() -> Tensor:
        model.zero_grad()
        total = pruner.loss(losses(model, 0))
        total.backward()
        seen.append(total.item())
        return total

    for _ in range(40):
        optimizer.step(closure)
        pruner.step()
    assert seen[-1] < seen[0] / 2
    _final(pruner, model)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, in the form that is copied most (davda54/sam)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = self.param_groups[0]["params"]
        scale = 0.05 / torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * scale)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("at_once", [True, False])
def test_sharpness_aware_minimisation_in_one_call_or_two(at_once: bool) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=60)
    optimizer = SAM(model.parameters())
    first = sum(losses(model, 0).values()).item()  # type: ignore[union-attr]
    perturbed = []
    for step in range(60):

        def closure(step: int = step) -> None:
            pruner.loss(losses(model, step % 2)).backward()
            perturbed.append(zeros(pruner))

        pruner.loss(losses(model, step % 2)).backward()
        present = zeros(pruner)
        if at_once:
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        if step == 30:  # in one call, most pruned weights stay zero; in two, most do not
            assert present > 0.5 * weights(pruner)
            assert (perturbed[-1] > 0.8 * present) if at_once else (perturbed[-1] < 0.5 * present)
        pruner.step()
    assert sum(losses(model, 0).values()).item() < first / 2  # type: ignore[union-attr]
    _final(pruner, model)


class _Copies:
    """A loop of gradient descent that keeps copies of the weights."""

    def __init__(self, model: nn.Module, pruner: Pruner, how: str) -> None:
        self.model, self.pruner, self.how = model, pruner, how
        self.parameters = list(model.parameters())
        self.optimizer: Any = None
        if how == "SGD":
            self.optimizer = torch.optim.SGD(self.parameters, lr=0.05)
        elif how == "in a step":
            self.optimizer = Master(self.parameters)
        self.copies = [parameter.detach().clone() for parameter in self.parameters]

    def train(self, steps: range) -> None:
        for step in steps:
            self.model.zero_grad()
            self.pruner.loss(losses(self.model, step)).backward()
            if self.optimizer is None:
                self.update()
            else:
                self.optimizer.step()
            self.pruner.step()

    @torch.no_grad()
    def update(self) -> None:
        old = [copied.clone() for copied in self.copies]
        for copied, parameter in zip(self.copies, self.parameters, strict=True):
            copied.sub_(parameter.grad, alpha=0.05)  # type: ignore[arg-type]
        if self.how == "a vector":
            vector = nn.utils.parameters_to_vector(self.copies)
            nn.utils.vector_to_parameters(vector, self.parameters)
            return
        for parameter, new, before in zip(self.parameters, self.copies, old, strict=True):
            if self.how == "changes":
                parameter.add_(new - before)
            else:
                parameter.copy_(new)


methods = pytest.mark.parametrize(
    "method", ["adaptive", Magnitude(), Adaptive(reach=torch.inf)], ids=["lamp", "masks", "soft"]
)


@methods
@pytest.mark.parametrize("how", ["copied", "a vector"])
def test_weights_that_are_written_from_elsewhere_are_warned_of_once(how: str, method: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, method=method, total_steps=40)
    said = r"a copy of its own.*torch\.optim\.Optimizer.*add_"
    with pytest.warns(UserWarning, match=said) as found:
        _Copies(model, pruner, how).train(range(40))
    assert len(found) == 1
    _final(pruner, model)


@methods
@pytest.mark.parametrize("how", ["in a step", "changes"])
def test_they_may_be_written_in_a_step_or_as_changes(how: str, method: Any) -> None:
    """Which are the remedies that the warning names."""
    found = []
    for kind in ("SGD", how):
        torch.manual_seed(0)
        model = TwoTasks().double()  # rounding differs, and thresholds make more of it
        model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        pruner = prepare(model, method=method, total_steps=40)
        loop = _Copies(model, pruner, kind)
        loop.train(range(30))
        assert zeros(pruner) > 0.5 * weights(pruner)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loop.train(range(30, 40))
        _final(pruner, model)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# --- between the parts of a step, and at the last one --------------------------------------------


def test_a_state_that_is_loaded_after_a_bad_loss_goes_on() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=500, schedule=EARLY)  # updates are ten steps apart
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(3))
    saved = copy.deepcopy(model.state_dict())
    pruner.loss({task: loss * torch.nan for task, loss in losses(model, 3).items()})
    model.load_state_dict(saved)
    train(model, pruner, optimizer, range(3, 30))  # past an update, which looks for bad losses
    assert pruner.report().step == 30


@pytest.mark.parametrize("gradient", ["straight_through", "mask"])
def test_thresholds_may_move_between_forward_and_backward(gradient: Any) -> None:
    """As they do where a second optimiser steps on the same forward pass."""
    model = TwoTasks()
    schedule = SparsitySchedule(start=0.0, end=0.7)
    pruner = prepare(model, gradient=gradient, schedule=schedule, weighting="equal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(5))
    found = []
    for moves in (False, True):
        optimizer.zero_grad()
        total = pruner.loss(losses(model, 5))
        if moves:
            pruner.controller.update(6)
        total.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_kept_weight_that_lands_on_zero_is_none_of_the_zeros() -> None:
    model = TwoTasks()
    pruner = prepare(model, schedule=SparsitySchedule(start=0.0, end=0.5, fix_at=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(19))
    layer = pruner.layers[0]
    with torch.no_grad():
        layer.weight[layer.threshold.mask] = 0.0
    pruner.step()
    _final(pruner, model)
