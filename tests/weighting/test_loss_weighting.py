"""What is the same for all weightings: the sum, state, precision; no wait and no growth."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import Error, raises
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from weightings import TASKS, WEIGHTINGS, all_weightings, scalars

from torch_adapmtl import (
    EqualWeighting,
    LossWeighting,
    StabilityWeighting,
)


@WEIGHTINGS
def test_sum_is_differentiable_and_weights_are_detached(index: int) -> None:
    weighting = all_weightings()[index]
    for step in range(4):
        losses = {task: torch.rand((), dtype=torch.float64, requires_grad=True) for task in TASKS}
        total = weighting(losses)
        assert total.shape == ()
        total.backward()
        weights = weighting.weights()
        assert not weights.requires_grad
        assert weights.sum().item() == pytest.approx(3, rel=1e-6), step
        grads = torch.stack([loss.grad for loss in losses.values()])
        assert torch.equal(grads, weights.double())
        torch.testing.assert_close(
            total, sum(w * x for w, x in zip(weights, losses.values(), strict=True))
        )


@WEIGHTINGS
def test_missing_tasks_are_skipped(index: int) -> None:
    weighting = all_weightings()[index]
    loss = torch.tensor(2.0, requires_grad=True)
    for _ in range(3):
        total = weighting({"seg": None, "depth": loss})
    total.backward()
    expected = weighting.weights()[1]
    assert loss.grad == expected
    torch.testing.assert_close(total.detach(), 2 * expected)


@WEIGHTINGS
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_changes_nothing(index: int, how: str) -> None:
    weighting = all_weightings()[index]
    for i in range(4):
        weighting(scalars(seg=1.0 + i, depth=2.0 - 0.1 * i, normal=1.0))
    before = {name: buffer.clone() for name, buffer in weighting.state_dict().items()}
    weighting.train(how != "eval")
    context = {"eval": torch.enable_grad, "no_grad": torch.no_grad}.get(how, torch.inference_mode)
    with context():
        weighting(scalars(seg=9.0, depth=math.nan, normal=9.0))
    weighting.check_finite()
    assert all(torch.equal(before[n], b) for n, b in weighting.state_dict().items())


@WEIGHTINGS
def test_works_again_after_inference_mode(index: int) -> None:
    weighting = all_weightings()[index]
    with torch.inference_mode():
        weighting(scalars(seg=9.0, depth=1.0, normal=9.0))
    loss = torch.tensor(2.0, requires_grad=True)
    weighting({"seg": loss}).backward()
    copy.deepcopy(weighting)({"depth": loss}).backward()
    assert loss.grad is not None


@WEIGHTINGS
def test_two_sums_can_be_taken_before_going_backward(index: int) -> None:
    weighting = all_weightings()[index]
    loss = torch.tensor(2.0, requires_grad=True)
    first = weighting({"seg": loss})
    second = weighting({"seg": loss, "depth": loss})
    for buffer in weighting.buffers():
        buffer.copy_(buffer.clone())  # as DistributedDataParallel does before each forward
    (first + second).backward()
    assert torch.isfinite(loss.grad)


@WEIGHTINGS
def test_state_continues_bit_for_bit(index: int) -> None:
    rows = torch.rand(30, 3)

    def run(weighting: LossWeighting, start: int, stop: int) -> list[Tensor]:
        return [weighting(dict(zip(TASKS, row, strict=True))) for row in rows[start:stop]]

    whole = run(all_weightings()[index], 0, 30)
    weighting = all_weightings()[index]
    run(weighting, 0, 13)
    loaded = all_weightings()[index]
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))):
        assert [x.item() for x in run(other, 13, 30)] == [x.item() for x in whole[13:]]
        assert torch.equal(other.weights(), other.weights())


@pytest.mark.parametrize(
    "loss_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_statistics_are_float32_whatever_the_dtype_of_losses(loss_dtype: torch.dtype) -> None:
    rows = torch.rand(10, 2).to(loss_dtype)
    results = []
    for dtype in (loss_dtype, torch.float32):
        weighting = StabilityWeighting(["a", "b"], window=6, start=0)
        for row in rows:
            total = weighting({"a": row[0].to(dtype), "b": row[1].to(dtype)})
        assert weighting.history.dtype == torch.float32
        results.append(weighting.weights())
    assert total.dtype == torch.float32
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_sum_is_float32_or_wider() -> None:
    weighting = EqualWeighting(["a", "b"])
    big = torch.tensor(40000.0, dtype=torch.float16)
    assert weighting({"a": big, "b": big}) == 80000
    assert weighting({"a": big, "b": big.double()}).dtype == torch.float64


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_leaves_the_statistics(cast: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.weighting = StabilityWeighting(["a", "b"], window=4, start=0, bounds=None)
    for _ in range(6):
        model.weighting({"a": 1e6 * torch.rand(()), "b": torch.rand(())})
    before = {name: b.clone() for name, b in model.weighting.named_buffers()}
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, buffer in model.weighting.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_state_lives_in_the_model() -> None:
    model = nn.Module()
    model.weighting = StabilityWeighting(["a"], window=4, start=0)
    assert list(model.state_dict()) == [
        "weighting.history",
        "weighting.counts",
        "weighting.steps",
        "weighting.seen",
        "weighting.record.latest",
        "weighting.record.course",
    ]
    assert not list(model.parameters())


def test_losses_of_a_compiled_function() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def losses_of(x: Tensor) -> dict[str, Tensor]:
        return {"a": x.square().mean(), "b": x.abs().mean()}

    x = torch.ones(3, requires_grad=True)
    weighting = StabilityWeighting(["a", "b"], window=4, start=0)
    for _ in range(3):
        weighting(losses_of(x)).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 3.0))


# --- no synchronisation, no growth ---


class NoWait(TorchDispatchMode):
    """Raises where a device would have to be waited for, and counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func._schema.name
        if name in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::lift_fresh",  # torch.tensor(..., device=...)
            "aten::scalar_tensor",  # torch.where with a number; older releases copy it
        }:
            raise AssertionError(f"{name} waits for the device")
        out = func(*args, **(kwargs or {}))
        if name in {"aten::_to_copy", "aten::copy_", "aten::where"}:
            given = [a for a in args if isinstance(a, Tensor)]
            if any(tensor.device != out.device for tensor in given):
                raise AssertionError(f"{name} copies between devices")
        return out


@WEIGHTINGS
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_no_step_waits_for_the_device_or_grows(index: int, place: str) -> None:
    # On "meta" whatever is made on the CPU shows as a copy between devices.
    weighting = all_weightings()[index].to(place)
    losses = {task: torch.rand((), device=place, requires_grad=True) for task in TASKS}
    some: dict[str, Tensor | None] = {"seg": losses["seg"], "depth": None}
    operations, sizes = [], []
    for _ in range(12):
        with NoWait() as mode:
            weighting(losses).backward()
            weighting(some).backward()
        operations.append(mode.operations)
        sizes.append(sum(b.numel() for b in weighting.buffers()))
    assert len(set(operations[3:])) == 1  # in the first the record reads more
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x[x > 0],
    ],
)
def test_the_check_for_waiting_finds_it(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWait():
        wait(torch.ones((), device="meta"))


@pytest.mark.gpu
@WEIGHTINGS
def test_no_step_waits_for_the_gpu(index: int) -> None:
    weighting = all_weightings()[index].cuda()
    losses = {task: torch.rand((), device="cuda", requires_grad=True) for task in TASKS}
    weighting(losses).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            weighting(losses).backward()
            weighting({"seg": losses["seg"]}).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weighting.weights().sum().item() == pytest.approx(3)


@pytest.mark.gpu
def test_losses_come_to_the_device_of_the_buffers() -> None:
    weighting = StabilityWeighting(["a", "b"], window=4, start=0).cuda()
    loss = torch.tensor(2.0, requires_grad=True)
    total = weighting({"a": loss, "b": loss.cuda()})
    total.backward()
    assert total.device.type == "cuda"
    assert loss.grad == 2


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LossWeighting(["a"])


def test_a_checkpoint_of_another_window_is_refused() -> None:
    weighting = StabilityWeighting(["a"], window=3, start=0)
    with pytest.raises(RuntimeError, match="size mismatch for history"):
        weighting.load_state_dict(StabilityWeighting(["a"], window=4, start=0).state_dict())


@pytest.mark.parametrize(
    ("tasks", "error", "found", "remedy"),
    [
        ([], ValueError, "got []", "at least one task"),
        (["a", "a"], ValueError, "got ['a', 'a']", "each once"),
        ("seg", TypeError, "'seg'", "a sequence"),
        ([1], TypeError, "got [1]", "task names"),
        (3, TypeError, "got 3", "a sequence"),
    ],
    ids=str,
)
def test_refused_tasks(tasks: Any, error: Error, found: str, remedy: str) -> None:
    raises(lambda: EqualWeighting(tasks), error, "tasks", found, remedy)
