"""Going on to another target, higher or lower."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sparse_models import assert_within, count, gone, seen, sparse_model
from toys import TwoTasks, batch, losses, prepare, tensors, train, zeros


@pytest.mark.filterwarnings("ignore:all components are equally")  # of so few weights some are
@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}, {"granularity": "component"}])
@pytest.mark.parametrize("stop", [0, 5, 12])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 0.95])
def test_another_target_is_met_exactly(target: float, stop: int, options: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=12, **options)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
    train(model, pruner, optimizer, range(stop))
    before, x = pruner.sparsity(), batch(99)[0]
    outputs = model(x)
    where = {name: weight == 0 for name, weight in seen(model).items()}
    pruner.retarget(target, total_steps=15)
    assert pruner.sparsity() == pytest.approx(before, abs=0.03)
    if stop == 12:  # the zeros were fixed: nothing jumps
        for task, out in model(x).items():
            torch.testing.assert_close(out, outputs[task])
    low, high = sorted((before, target))
    for step in range(15):
        train(model, pruner, optimizer, [step])
        assert low - 0.03 <= pruner.sparsity() <= high + 0.03
    assert zeros(pruner) == round(target * 168)
    if stop == 12 and target >= 0.8:
        assert_within(model, where)
    pruner.finalize()
    assert count(gone(model)) == round(target * 168)


def test_zeros_that_were_given_stay_when_the_target_falls() -> None:
    model = sparse_model(0.4)
    before = gone(model)
    pruner = prepare(model, target_sparsity=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, pruner, optimizer, range(20))
    with pytest.raises(ValueError, match=r"target_sparsity=0.3 asks for 50 zeros"):
        pruner.retarget(0.3, total_steps=20)
    assert zeros(pruner) == round(0.9 * 168)  # nothing has changed
    pruner.retarget(0.5, total_steps=20)
    train(model, pruner, optimizer, range(20))
    assert zeros(pruner) == 84
    assert_within(model, before)


@pytest.mark.parametrize("stop", [3, 25])
def test_the_other_target_is_saved_and_resumed(stop: int) -> None:
    model, fresh = TwoTasks(), TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(20))
    pruner.retarget(0.4, total_steps=30)
    train(model, pruner, optimizer, range(stop))
    state = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(stop, 30))
    other = prepare(fresh)
    with pytest.raises(ValueError, match=r"total_steps=30, this model was prepared with .*=20"):
        fresh.load_state_dict(state)
    other.retarget(0.4, total_steps=30)
    fresh.load_state_dict(state)
    train(fresh, other, torch.optim.SGD(fresh.parameters(), lr=0.1), range(stop, 30))
    assert all(torch.equal(value, tensors(fresh)[key]) for key, value in tensors(model).items())


@pytest.mark.parametrize("stop", [18, 19, 30])
def test_nothing_jumps_when_the_target_falls(stop: int) -> None:
    """Momentum has moved what the masks hide."""
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for step in range(stop):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 20:
            pruner.step()
    x = batch(99)[0]
    outputs = model(x)
    pruner.retarget(0.5, total_steps=20)
    assert zeros(pruner) == round(0.8 * 168)
    for task, out in model(x).items():
        torch.testing.assert_close(out, outputs[task])


def test_the_same_target_in_other_words_keeps_the_zeros() -> None:
    model = TwoTasks()
    pruner = prepare(model)  # 134 of 168
    pruner.fix_zeros()
    where = {name: weight == 0 for name, weight in seen(model).items()}
    pruner.retarget(0.797, total_steps=20)  # 133.9
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20))
    assert_within(model, where)


def test_steps_that_a_scaler_skipped_do_not_count_in_the_next_run() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=600)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
    for step in range(9):
        loss = pruner.loss(losses(model, step))
        scaler.scale(loss * torch.inf if step > 3 else loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**4)
        optimizer.zero_grad()
    pruner.retarget(0.5, total_steps=20)
    assert pruner.report().step == 0
    pruner.loss(losses(model, 0)).backward()
    optimizer.step()
    assert pruner.report().step == 1
    pruner.detach()
    assert pruner.report().step == 1


@pytest.mark.filterwarnings("ignore:.*was called more than total_steps")
def test_an_attached_optimizer_goes_on() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)

    def steps(number: int) -> None:
        for step in range(number):
            pruner.loss(losses(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(23)
    pruner.retarget(0.9, total_steps=10)
    steps(12)
    assert zeros(pruner) == round(0.9 * 168)
