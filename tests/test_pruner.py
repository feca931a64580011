"""The handle: the loop, the end, and models of many kinds; for errors see test_bad_input.py."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from toys import (
    TwoTasks,
    batch,
    losses,
    prepare,
    pruned,
    tensors,
    train,
    weights,
    zeros,
)

from torch_adapmtl import Report

# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("own_groups", [True, False])
def test_three_lines(own_groups: bool) -> None:
    model = TwoTasks()
    identities = {name: id(p) for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    before = torch.optim.AdamW(model.parameters(), lr=1e-2)

    pruner = prepare(model)
    assert model.adapmtl is pruner
    assert pruner.components.names == ("shared", "a", "b")
    assert pruner.tasks == ("a", "b")
    assert prune.is_pruned(model)
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-2)) if own_groups else before
    train(model, pruner, optimizer, range(20))
    assert pruner.sparsity() == round(0.8 * weights(pruner)) / weights(pruner)

    model.eval()
    x = batch(77)[0]
    expected, hooked = model(x), tensors(model.body)
    assert pruner.finalize() is model
    found = model(x)
    assert all(torch.equal(expected[task], found[task]) for task in expected)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not prune.is_pruned(model)
    assert not hasattr(model, "adapmtl")
    assert set(hooked) != set(model.body.state_dict())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not parametrize.is_parametrized(module)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    # And training goes on, now without any mask.
    sum(losses(model, 0).values()).backward()
    optimizer.step()
    assert zeros(pruner) < round(0.8 * weights(pruner))


def test_nothing_of_the_handle_is_kept_alive() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    pruner.finalize()
    alive = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert alive() is None


def test_survivors_that_became_zero_do_not_spoil_the_count() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    pruner.fix_zeros()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert zeros(pruner) == weights(pruner)
    with pytest.warns(UserWarning, match="no weight is left in 3 of 3 layers"):
        pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_zeros_stay_under_momentum_and_decay() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, pruner, optimizer, range(20))
    gone = {t.name: getattr(*t.owners[0]) == 0 for t in pruned(pruner)}
    for step in range(20, 30):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
    for tensor in pruned(pruner):
        assert torch.equal(getattr(*tensor.owners[0]) == 0, gone[tensor.name])
    pruner.finalize()
    for tensor in pruned(pruner):
        assert torch.equal(tensor.parameter == 0, gone[tensor.name])


def test_attach_saves_the_third_line() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner.attach(optimizer)
    for step in range(25):  # five more than total_steps
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert zeros(pruner) == round(0.8 * weights(pruner))

    torch.manual_seed(0)
    other = TwoTasks()
    plain = prepare(other)
    again = torch.optim.Adam(other.parameters(), lr=1e-2)
    train(other, plain, again, range(20))
    for step in range(20, 25):
        plain.loss(losses(other, step)).backward()
        again.step()
        again.zero_grad()
    plain.finalize()
    pruner.finalize()
    expected = other.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    pruner = prepare(model)
    pruner.attach(optimizer)  # the hook of before is gone
    optimizer.step()
    assert pruner._step == 1


def test_attaching_ends_with_finalize() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    pruner.fix_zeros()
    assert optimizer._optimizer_step_post_hooks  # another target may follow
    optimizer.step()  # nothing is left to move
    pruner.finalize()
    assert not optimizer._optimizer_step_post_hooks


# --- looking at it ------------------------------------------------------------------------------


def test_sparsity_and_report_count_what_the_model_sees() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=50)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    report = pruner.report()
    assert isinstance(report, Report)
    assert (report.step, report.total_steps, report.target_sparsity) == (20, 50, 0.8)
    found = {
        "shared": model.body.weight,
        "a": model.heads["a"].weight,
        "b": model.heads["b"].weight,
    }
    expected = {name: float((w == 0).float().mean()) for name, w in found.items()}
    assert pruner.sparsity("component") == pytest.approx(expected)
    assert list(pruner.sparsity("layer")) == ["body.weight", "heads.a.weight", "heads.b.weight"]
    assert pruner.sparsity() == zeros(pruner) / weights(pruner)
    assert 0 < pruner.sparsity() < 0.8
    for row, weight in zip(report.layers, found.values(), strict=True):
        original = dict(model.named_parameters())[
            row.name.removesuffix("weight") + "parametrizations.weight.original"
        ]
        assert row.zeros == int((original.abs() <= row.threshold).sum())
        assert row.shape == tuple(weight.shape)
    assert sum(report.task_weights.values()) == pytest.approx(2)
    assert "shared" in str(report)


# --- errors -------------------------------------------------------------------------------------


def _assert_untouched(model: nn.Module, keys: list[str], before: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "adapmtl")
    for module in model.modules():
        assert "Parametrized" not in type(module).__name__
        assert all(
            "SoftThreshold" not in type(h).__name__ for h in module._forward_pre_hooks.values()
        )


def test_a_failure_while_attaching_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_adapmtl.layers import layer

    model = TwoTasks()
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    mask = (torch.rand(5, 12) > 0.5).float()
    prune.custom_from_mask(model.heads["a"], "weight", mask)
    before, keys = tensors(model), list(model.state_dict())
    attach, calls = layer.attach_threshold, []

    def failing(module: nn.Module, name: str, threshold: Any) -> Any:
        calls.append(module)
        if module is model.heads["b"]:
            raise RuntimeError("no")
        return attach(module, name, threshold)

    monkeypatch.setattr(layer, "attach_threshold", failing)
    with pytest.raises(RuntimeError, match=r"^no$"):
        prepare(model)
    assert len(calls) == 4
    _assert_untouched(model, keys, before)
    assert torch.equal(model.heads["a"].weight_mask, mask)
    assert prune.is_pruned(model)


def test_early_freeze_prunes_to_the_target() -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(3))
    pruner.fix_zeros()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    frozen = tensors(model)
    pruner.fix_zeros()  # once more changes nothing
    assert all(torch.equal(value, frozen[key]) for key, value in tensors(model).items())
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))
