"""The loss weightings: what enters the windows, which weights follow, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adapmtl import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
    LossWeighting,
    StabilityWeighting,
)
from torch_adapmtl.weighting._make import make_weighting

TASKS = ("seg", "depth", "normal")


def scalars(**values: float) -> dict[str, Tensor]:
    return {task: torch.tensor(value, dtype=torch.float64) for task, value in values.items()}


def as_losses(row: list[float | None], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A row of values (None: missing) as losses of tasks t0, t1, ..."""
    return {
        f"t{i}": None if value is None else torch.tensor(value, dtype=dtype)
        for i, value in enumerate(row)
    }


def feed(weighting: LossWeighting, rows: list[list[float | None]]) -> LossWeighting:
    for row in rows:
        if any(value is not None for value in row):
            weighting(as_losses(row))
    return weighting


def inverse(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: 1 / loss for task, loss in losses.items()}


def all_weightings(tasks: tuple[str, ...] = TASKS) -> list[LossWeighting]:
    return [
        EqualWeighting(tasks),
        FixedWeighting(tasks, {task: i + 1.0 for i, task in enumerate(tasks)}),
        CallableWeighting(tasks, inverse),
        StabilityWeighting(tasks, window=5, start=0),
        StabilityWeighting(tasks, window=5, start=0, direction="deviating", bounds=None),
        StabilityWeighting(tasks, window=5, start=0, deviation="coefficient_of_variation"),
    ]


WEIGHTINGS = pytest.mark.parametrize("index", range(6))


# --- the oracle -----------------------------------------------------------------------------


class Oracle:
    """Stability weighting with lists and floats, written from its description."""

    def __init__(self, count: int, **settings: Any) -> None:
        self.windows: list[list[float]] = [[] for _ in range(count)]
        self.steps = 0
        self.__dict__.update(settings)

    def observe(self, row: list[float | None]) -> None:
        self.steps += 1
        for window, value in zip(self.windows, row, strict=True):
            if value is not None and math.isfinite(value):
                window.append(value)
                del window[: -self.window]

    def deviation_of(self, losses: list[float]) -> float:
        if self.deviation == "relative_change":
            changes = []
            for before, after in itertools.pairwise(losses):
                if after == 0:
                    changes.append(0.0 if before == 0 else 1.0)
                else:
                    changes.append(min(abs(after - before) / abs(after), 1e6))
            return sum(changes) / len(changes)
        mean = sum(losses) / len(losses)
        std = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))
        if std == 0:
            return 0.0
        return min(std / abs(mean), 1e6) if mean else 1e6

    def weights(self) -> list[float]:
        weights = [1.0] * len(self.windows)
        ready = [i for i, window in enumerate(self.windows) if len(window) >= 2]
        if self.steps > self.start:
            deviations = {i: max(self.deviation_of(self.windows[i]), 1e-6) for i in ready}
            raw = {i: 1 / d if self.direction == "stable" else d for i, d in deviations.items()}
            for i in ready:
                weights[i] = raw[i] / sum(raw.values()) * len(ready)
        if self.bounds is None:
            return weights
        lower, upper = self.bounds
        factor = 1.0
        for weight in weights:
            if 1 + factor * (weight - 1) > upper:
                factor = (upper - 1) / (weight - 1)
            if 1 + factor * (weight - 1) < lower:
                factor = (1 - lower) / (1 - weight)
        return [1 + factor * (weight - 1) for weight in weights]


losses_of_any_size = st.one_of(
    st.none(),
    st.floats(0.01, 100),
    st.floats(1e-30, 1e30),
    st.sampled_from([0.0, 1.0, -2.5, math.nan, math.inf, -math.inf]),
)
ordinary_losses = st.floats(0.1, 10).map(lambda x: float(torch.tensor(x)))  # float32 values
settings_of_stability = st.fixed_dictionaries(
    {
        "window": st.integers(2, 6),
        "start": st.integers(0, 4),
        "direction": st.sampled_from(["stable", "deviating"]),
        "deviation": st.sampled_from(["relative_change", "coefficient_of_variation"]),
        "bounds": st.sampled_from([None, (0.5, 1.5), (0.0, 2.0), (0.8, 1.0), (0.9, 3.0)]),
    }
)


@st.composite
def histories(draw: st.DrawFn, losses: st.SearchStrategy[Any]) -> list[list[float | None]]:
    count = draw(st.integers(1, 4))
    row = st.lists(losses, min_size=count, max_size=count)
    return draw(st.lists(row, min_size=1, max_size=12))


@given(
    rows=histories(st.one_of(st.none(), ordinary_losses, st.sampled_from([math.nan, 0.0]))),
    settings=settings_of_stability,
)
def test_stability_agrees_with_the_oracle_after_every_step(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    count = len(rows[0])
    weighting = StabilityWeighting([f"t{i}" for i in range(count)], **settings)
    oracle = Oracle(count, **settings)
    for row in rows:
        if all(value is None for value in row):
            continue
        total = weighting(as_losses(row))
        oracle.observe(row)
        expected = torch.tensor(oracle.weights())
        torch.testing.assert_close(weighting.weights(), expected, rtol=2e-4, atol=2e-4)
        if all(value is None or math.isfinite(value) for value in row):
            summed = sum(w * v for w, v in zip(oracle.weights(), row, strict=True) if v is not None)
            assert total.item() == pytest.approx(summed, rel=1e-3, abs=1e-3)


@given(rows=histories(losses_of_any_size), settings=settings_of_stability)
def test_stability_weights_sum_to_t_within_bounds_whatever_the_losses(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    count = len(rows[0])
    weighting = StabilityWeighting([f"t{i}" for i in range(count)], **settings)
    feed(weighting, rows)
    weights = weighting.weights()
    assert torch.isfinite(weights).all()
    assert weights.sum().item() == pytest.approx(count, rel=1e-5)
    lower, upper = settings["bounds"] or (0.0, count + 1e-5)
    assert ((weights >= lower) & (weights <= upper)).all()


@given(
    rows=histories(ordinary_losses),
    settings=settings_of_stability,
    power=st.integers(-20, 20),
    factor=st.floats(1e-6, 1e6),
)
def test_stability_is_scale_free_per_task(
    rows: list[list[float | None]], settings: dict[str, Any], power: int, factor: float
) -> None:
    def weights_with(scale: float) -> Tensor:
        scaled = [[row[0] * scale, *row[1:]] for row in rows]
        return feed(
            StabilityWeighting([f"t{i}" for i in range(len(rows[0]))], **settings), scaled
        ).weights()

    assert torch.equal(weights_with(1.0), weights_with(2.0**power))
    torch.testing.assert_close(weights_with(1.0), weights_with(factor), rtol=2e-2, atol=2e-3)


@given(rows=histories(losses_of_any_size), settings=settings_of_stability, data=st.data())
def test_stability_does_not_depend_on_the_order_of_tasks(
    rows: list[list[float | None]], settings: dict[str, Any], data: st.DataObject
) -> None:
    tasks = [f"t{i}" for i in range(len(rows[0]))]
    order = data.draw(st.permutations(range(len(tasks))))
    weighting = feed(StabilityWeighting(tasks, **settings), rows)
    permuted = feed(StabilityWeighting([tasks[i] for i in order], **settings), rows)
    torch.testing.assert_close(weighting.weights()[list(order)], permuted.weights())


@given(rows=histories(losses_of_any_size), settings=settings_of_stability)
def test_a_missing_task_leaves_its_window_and_the_other_windows_alone(
    rows: list[list[float | None]], settings: dict[str, Any]
) -> None:
    tasks = [f"t{i}" for i in range(len(rows[0]))]
    weighting = feed(StabilityWeighting([*tasks, "rare"], **settings), rows)
    alone = feed(StabilityWeighting(tasks, **settings), rows)
    assert torch.equal(weighting.history[:-1], alone.history)
    assert torch.equal(weighting.counts[:-1], alone.counts)
    assert torch.equal(weighting.steps, alone.steps)
    assert not weighting.history[-1].any()
    assert weighting.counts[-1] == 0


def test_tasks_without_two_losses_keep_weight_1_and_the_others_share_the_rest() -> None:
    rows = [[1.0, 1.0, 5.0], [1.1, 2.0, None], [1.0, 1.0, None]]
    tasks = ["t0", "t1", "t2"]
    weights = feed(StabilityWeighting(tasks, window=3, start=0, bounds=None), rows).weights()
    pair = feed(
        StabilityWeighting(tasks[:2], window=3, start=0, bounds=None), [row[:2] for row in rows]
    ).weights()
    assert weights[2] == 1
    torch.testing.assert_close(weights[:2], pair)


def test_directions_of_text_and_code() -> None:
    rows = [[1.0 + 0.01 * (i % 2), 1.0 + i % 2] for i in range(10)]
    text = feed(StabilityWeighting(["t0", "t1"], window=8, start=0), rows).as_dict()
    code = feed(
        StabilityWeighting(["t0", "t1"], window=8, start=0, direction="deviating"), rows
    ).as_dict()
    assert text == {"t0": 1.5, "t1": 0.5}
    assert code == {"t0": 0.5, "t1": 1.5}


def test_first_steps_weigh_equally_while_windows_fill() -> None:
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=3)
    rows = [[1.0, 1.0], [1.1, 2.0], [1.0, 1.0], [1.1, 2.0]]
    for row in rows[:3]:
        weighting(as_losses(row))
        assert weighting.as_dict() == {"t0": 1.0, "t1": 1.0}
    weighting(as_losses(rows[3]))
    assert weighting.as_dict() == {"t0": 1.5, "t1": 0.5}
    assert weighting.counts.tolist() == [4, 4]


@pytest.mark.parametrize("direction", ["stable", "deviating"])
@pytest.mark.parametrize("deviation", ["relative_change", "coefficient_of_variation"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-45, 1e38, 1e300])
def test_constant_losses_weigh_equally(direction: Any, deviation: Any, value: float) -> None:
    weighting = StabilityWeighting(
        ["t0", "t1"], window=7, start=0, direction=direction, deviation=deviation, bounds=None
    )
    feed(weighting, [[value, value]] * 9)
    assert weighting.as_dict() == {"t0": 1.0, "t1": 1.0}


def test_one_flat_loss_takes_no_more_than_its_bound() -> None:
    rows = [[1.0, 2.0 + i % 2, 3.0 + i % 3] for i in range(9)]
    tasks = ["t0", "t1", "t2"]
    free = feed(StabilityWeighting(tasks, window=7, start=0, bounds=None), rows).as_dict()
    bound = feed(StabilityWeighting(tasks, window=7, start=0), rows).as_dict()
    assert free["t0"] > 2.99
    assert bound["t0"] == 1.5
    assert sum(bound.values()) == pytest.approx(3)


def test_a_single_task_always_has_weight_1() -> None:
    weighting = StabilityWeighting(["t0"], window=3, start=0, bounds=None)
    assert feed(weighting, [[float(i)] for i in range(6)]).as_dict() == {"t0": 1.0}


# --- what is the same for all weightings ------------------------------------------------------


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
        "weighting.record.first",
        "weighting.record.recent",
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


# --- non-finite losses ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_stays_out_of_the_window_and_is_named(value: float) -> None:
    rows = [[1.0, 2.0], [1.5, 2.1], [1.2, 2.3]]
    clean = feed(StabilityWeighting(["t0", "t1"], window=4, start=0), rows)
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=0)
    feed(weighting, rows[:2])
    total = weighting(as_losses([value, None]))
    assert not math.isfinite(total.item())  # a gradient scaler must see it
    feed(weighting, rows[2:])
    assert torch.equal(weighting.history, clean.history)
    assert torch.equal(weighting.weights(), clean.weights())
    with pytest.raises(RuntimeError, match=r"NaN or infinite loss of the tasks 't0' \(1x\)\."):
        weighting.check_finite()
    weighting.check_finite()  # it was said once


def test_check_finite_counts_every_task() -> None:
    weighting = EqualWeighting(["a", "b", "c"])
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    weighting({"a": nan, "b": one, "c": nan})
    weighting({"a": one, "b": None, "c": nan})
    with pytest.raises(RuntimeError, match=r"'a' \(1x\), 'c' \(2x\)"):
        weighting.check_finite()


def test_strict_raises_at_once_and_remembers_nothing() -> None:
    weighting = StabilityWeighting(["a", "b"], window=4, start=0, strict=True)
    with pytest.raises(RuntimeError, match=r"of the tasks 'b'"):
        weighting({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)})
    assert weighting.steps == 0
    weighting.check_finite()
    assert weighting({"a": torch.tensor(1.0)}) == 1


def test_a_loss_beyond_float32_is_finite() -> None:
    weighting = StabilityWeighting(["t0", "t1"], window=4, start=0)
    feed(weighting, [[1e300, 1.0], [-1e300, 2.0], [1e300, 1.0]])
    weighting.check_finite()
    assert weighting.counts.tolist() == [3, 3]
    assert torch.isfinite(weighting.weights()).all()


# --- no synchronisation, no growth --------------------------------------------------------------


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
    assert len(set(operations[1:])) == 1  # the first has no gradient to add to
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


# --- the simple weightings ------------------------------------------------------------------------


@given(weights=st.lists(st.floats(0, 1e300), min_size=1, max_size=5).filter(lambda w: max(w) > 0))
def test_fixed_keeps_ratios_and_sums_to_t(weights: list[float]) -> None:
    tasks = [f"t{i}" for i in range(len(weights))]
    found = FixedWeighting(tasks, dict(zip(tasks, weights, strict=True))).weights()
    shares = [w / max(weights) for w in weights]
    expected = torch.tensor([s / sum(shares) * len(tasks) for s in shares])
    torch.testing.assert_close(found, expected)


def test_callable_gets_the_present_losses_with_their_graph() -> None:
    parameter = torch.tensor(3.0, requires_grad=True)

    def by_gradient(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        assert list(losses) == ["a", "c"]
        return {
            task: torch.autograd.grad(loss, parameter, retain_graph=True)[0].abs()
            for task, loss in losses.items()
        }

    weighting = CallableWeighting(["a", "b", "c"], by_gradient)
    weighting({"c": 3 * parameter, "a": parameter, "b": None}).backward()
    assert weighting.as_dict() == {"a": 0.5, "b": 1.0, "c": 1.5}
    assert parameter.grad == 0.5 * 1 + 1.5 * 3


def test_callable_without_normalisation_is_used_as_returned() -> None:
    weighting = CallableWeighting(
        ["a", "b"], lambda losses: {"a": 0.25, "b": torch.tensor(10.0)}, normalize=False
    )
    assert weighting({"a": torch.tensor(4.0), "b": torch.tensor(1.0)}) == 11
    assert weighting.as_dict() == {"a": 0.25, "b": 10.0}


def test_callable_weights_without_positive_sum_are_left_alone() -> None:
    weighting = CallableWeighting(["a", "b"], lambda losses: {"a": 0, "b": torch.tensor(0.0)})
    assert weighting({"a": torch.tensor(4.0), "b": torch.tensor(1.0)}) == 0


# --- errors -----------------------------------------------------------------------------------


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LossWeighting(["a"])


def test_a_checkpoint_of_another_window_is_refused() -> None:
    weighting = StabilityWeighting(["a"], window=3, start=0)
    with pytest.raises(RuntimeError, match="size mismatch for history"):
        weighting.load_state_dict(StabilityWeighting(["a"], window=4, start=0).state_dict())


# --- make_weighting ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total_steps", "window", "start"), [(20_000, 500, 5_000), (100_000, 500, 25_000), (1, 10, 0)]
)
def test_make_stability(total_steps: int, window: int, start: int) -> None:
    for spec, direction in (("stability", "stable"), ("deviation", "deviating")):
        weighting = make_weighting(spec, ["a", "b"], total_steps)
        assert isinstance(weighting, StabilityWeighting)
        assert (weighting.window, weighting.start) == (window, start)
        assert weighting.direction == direction
        assert weighting.deviation == "relative_change"
        assert weighting.bounds == (0.5, 1.5)


def test_make_the_others() -> None:
    assert isinstance(make_weighting("equal", ["a"], 10), EqualWeighting)
    fixed = make_weighting({"a": 1, "b": 3}, ["a", "b"], 10)
    assert fixed.as_dict() == {"a": 0.5, "b": 1.5}
    assert isinstance(make_weighting(inverse, ["a"], 10), CallableWeighting)
    given = EqualWeighting(["b", "a"])
    assert make_weighting(given, ["a", "b"], 10) is given


def test_repr_shows_the_settings() -> None:
    text = repr(StabilityWeighting(["a"], window=3, start=7))
    assert "window=3, start=7, direction='stable'" in text
