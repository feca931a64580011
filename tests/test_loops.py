"""Training loops of many kinds, and what a step may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TwoTasks, batch, losses, prepare, tensors, train, weights, zeros

from torch_adapmtl import Paper, Pruner, SparsitySchedule, Taylor

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
