"""What a step may not do: wait for the device, read all weights, keep more and more."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TwoTasks, batch, losses, prepare, train, weights, zeros
from waiting import refused

from torch_adapmtl import ST3, Feather, Magnitude, SparsitySchedule
from torch_adapmtl.layers import sampling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "gradient"},
        {"allocation": "common", "gradient": "mask"},
        {"method": "paper"},
        {"method": Magnitude()},
        {"method": ST3()},
        {"method": Feather(theta=0.5)},
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device(options: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=450, **options)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    x, targets = batch(0)

    def step() -> None:
        outputs = model(x)
        found = {task: (outputs[task] - y).square().mean() for task, y in targets.items()}
        pruner.loss(found).backward()
        optimizer.step()
        optimizer.zero_grad()

    waits = 0
    for number in range(1, 46):
        with refused():
            step()
            if not pruner.controller.due(number) or options == {"method": "paper"}:
                pruner.step()
                continue
        with pytest.raises(AssertionError), refused():
            pruner.controller.update(number)  # the test does see it
        pruner.step()
        waits += 1
    with pytest.raises(AssertionError), refused():
        len(pruner.history)
    assert len(pruner.history) == 22  # recorded in between: every second step
    assert waits == (0 if options == {"method": "paper"} else 4)  # interval 9: every 9 or 10 steps


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adaptive", "paper"])
def test_cuda_says_the_same(method: Any) -> None:
    model = TwoTasks().cuda()
    pruner = prepare(model, total_steps=450, method=method, example_inputs=torch.ones(2, 6).cuda())
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    x, targets = batch(0)
    x, targets = x.cuda(), {task: y.cuda() for task, y in targets.items()}
    for number in range(1, 46):
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = model(x)
            found = {task: (outputs[task] - y).square().mean() for task, y in targets.items()}
            pruner.loss(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % 9 or method == "paper":
                pruner.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not number % 9 and method == "adaptive":
            pruner.step()
    if method == "adaptive":
        pruner.fix_zeros()
        assert zeros(pruner) == round(0.8 * weights(pruner))


class _Largest(TorchDispatchMode):
    """Remembers the largest result of an operation that is not just a view."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.total = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("detach", "_reshape_alias"):
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
                    self.total += tensor.numel()
        return result


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity"])
def test_an_update_reads_a_sample_of_the_weights(
    allocation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE", 500)
    monkeypatch.setattr(sampling, "LAYER_SAMPLE", 50)
    model = TwoTasks(4000)
    later = SparsitySchedule(start=0.05)  # weights that are pruned are all written
    pruner = prepare(model, total_steps=1000, allocation=allocation, schedule=later)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.01), range(10))
    pruner.loss(losses(model, 10)).backward()  # step 11 is the first that updates
    if allocation == "sensitivity":
        assert sorted(pruner.controller.allocator._gradients) == [0, 1, 2]
        assert sum(part.numel() for part in pruner.controller.allocator._gradients.values()) <= 650
    with _Largest() as seen:
        pruner.step()
    assert pruner.sparsity() == 0
    assert 0 < seen.size < 1000  # of 56,000 weights


@pytest.mark.parametrize("allocation", ["lamp", "sensitivity"])
def test_what_is_kept_does_not_grow(allocation: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, total_steps=450, allocation=allocation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes, hooks = [], []
    for step in range(1, 101):
        train(model, pruner, optimizer, [step])
        if step % 9 == 5:
            sizes.append(len(pickle.dumps(copy.deepcopy(model))))
            hooks.append(sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()))
            assert not getattr(pruner.controller.allocator, "_gradients", None)
    assert max(sizes[1:]) - min(sizes[1:]) <= 64  # numbers of more digits
    assert set(hooks[1:]) == {6 if allocation == "sensitivity" else 3}
