"""Saving, loading, copying, moving: the run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from toys import TwoTasks, batch, losses, prepare, tensors, train, weights, zeros
from untouched import assert_untouched

from torch_adapmtl import Pruner, SparsitySchedule, plain_state_dict

# 450 steps: an update every 9, the sparsity begins to rise at once.
RUN: dict[str, Any] = {"total_steps": 450, "schedule": SparsitySchedule(start=0.0, end=0.1)}


def _adam(pruner: Pruner) -> torch.optim.Optimizer:
    return torch.optim.Adam(pruner.param_groups(lr=3e-3, weight_decay=1e-3, threshold_lr=1e-2))


def _assert_equal(model: nn.Module, other: nn.Module) -> None:
    found, expected = tensors(model), tensors(other)
    assert list(found) == list(expected)
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    thresholds = (m.adapmtl.controller.thresholds() for m in (model, other))  # type: ignore[union-attr]
    assert torch.equal(*thresholds)


def _through_disk(state: Any, path: Path) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("stop", [0, 8, 9, 13, 28])
@pytest.mark.parametrize("allocation", ["lamp", "sensitivity", "gradient"])
def test_a_loaded_run_goes_on_bit_for_bit(stop: int, allocation: Any, tmp_path: Path) -> None:
    model = TwoTasks()
    fresh = copy.deepcopy(model)
    pruner = prepare(model, allocation=allocation, **RUN)
    optimizer = _adam(pruner)
    train(model, pruner, optimizer, range(stop))
    state = _through_disk((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    train(model, pruner, optimizer, range(stop, 40))

    other = prepare(fresh, allocation=allocation, **RUN)
    again = _adam(other)
    fresh.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert other.report().step == stop
    train(fresh, other, again, range(stop, 40))
    _assert_equal(fresh, model)
    if allocation != "gradient":
        assert (
            pruner.controller.offsets.by_layer().abs().max() > 0.01
        )  # there was something to lose

    for handle in (pruner, other):
        handle.fix_zeros()
    _assert_equal(fresh, model)
    assert torch.equal(fresh.body.weight, model.body.weight)


@pytest.mark.parametrize("masked", [False, True])
def test_the_end_is_saved_with_its_masks(masked: bool, tmp_path: Path) -> None:
    model, fresh = TwoTasks(), TwoTasks()
    if masked:
        mask = (torch.rand(12, 6) > 0.3).float()
        for net in (model, fresh):
            prune.custom_from_mask(net.body, "weight", mask)
    pruner = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, pruner, optimizer, range(20))
    for step in (20, 21):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
    state = _through_disk(model.state_dict(), tmp_path / "state.pt")

    other = prepare(fresh)
    fresh.load_state_dict(state)
    x = batch(5)[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh(x).values(), model(x).values(), strict=True))
    with pytest.warns(UserWarning, match="more than total_steps"):
        other.step()
    other.finalize()
    pruner.finalize()
    assert zeros(other) == round(0.8 * weights(other))
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, tensors(fresh)[key]) for key, value in tensors(model).items())


def test_loading_an_earlier_state_takes_the_end_back() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(5))
    state = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(5, 20))
    model.load_state_dict(state)
    assert pruner.sparsity() < 0.8
    train(model, pruner, optimizer, range(5, 20))
    assert zeros(pruner) == round(0.8 * weights(pruner))


def test_the_keys_that_are_added() -> None:
    model = TwoTasks()
    plain = list(model.state_dict())
    prepare(model)
    keys = list(model.state_dict())
    assert keys[: len(plain)] == plain
    added = keys[len(plain) :]
    assert all(key.startswith("adapmtl.") for key in added)
    assert {key.split(".")[1] for key in added} == {
        "_extra_state",
        "controller",
        "recorder",
        "weighting",
        "sparse_weights",
    }
    assert [key for key in added if ".controller." in key or ".sparse_weights." in key] == [
        "adapmtl.controller.level",
        "adapmtl.controller.scale",
        "adapmtl.controller.offsets.values",
        *(f"adapmtl.sparse_weights.residual_{i}" for i in range(3)),
    ]


@pytest.mark.parametrize("assign", [False, True])
def test_a_models_own_state_changes_nothing(assign: bool) -> None:
    """Not copied, as checkpoints of torch.distributed load it."""
    model = TwoTasks()
    pruner = prepare(model, **RUN)
    train(model, pruner, _adam(pruner), range(30))
    twin = copy.deepcopy(model)
    model.load_state_dict(model.state_dict(), assign=assign)
    _assert_equal(model, twin)
    for net in (model, twin):
        train(net, net.adapmtl, torch.optim.SGD(net.parameters(), lr=0.1), range(30, 40))
    _assert_equal(model, twin)


def test_the_plain_keys_hold_what_the_model_computes_with() -> None:
    model, plain = TwoTasks(), TwoTasks()
    pruner = prepare(model, **RUN)
    train(model, pruner, _adam(pruner), range(30))
    state = {key: value for key, value in model.state_dict().items() if "adapmtl" not in key}
    plain.load_state_dict(state)
    x = batch(5)[0]
    assert all(torch.equal(out, model(x)[task]) for task, out in plain(x).items())
    assert sum(int((p == 0).sum()) for p in plain.parameters()) == zeros(pruner) > 0


class _Interrupted(torch.optim.SGD):
    """Is interrupted in its sixth step, after the first weight."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 6:
            with torch.no_grad():
                weight = self.param_groups[0]["params"][0]
                weight.sub_(weight.grad, alpha=0.1)
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("when", ["after an error", "in a hook of the optimiser"])
def test_a_state_that_is_saved_in_an_optimisers_step(when: str) -> None:
    model, fresh = TwoTasks(), TwoTasks()
    pruner, other = prepare(model), prepare(fresh)
    optimizer = _Interrupted(model.parameters(), lr=0.1)
    states = []
    if when == "after an error":
        with pytest.raises(KeyboardInterrupt):
            train(model, pruner, optimizer, range(20))
        states.append(copy.deepcopy(model.state_dict()))
        model.zero_grad()
        pruner.step()
    else:
        train(model, pruner, optimizer, range(5))
        hook = optimizer.register_step_post_hook(
            lambda *_: states.append(copy.deepcopy(model.state_dict()))
        )
        optimizer.steps += 1
        train(model, pruner, optimizer, [5])
        hook.remove()
    fresh.load_state_dict(states[0])
    other.step()
    for net, handle in ((model, pruner), (fresh, other)):
        train(net, handle, torch.optim.SGD(net.parameters(), lr=0.1), range(6, 20))
    _assert_equal(fresh, model)
    assert zeros(other) == round(0.8 * weights(other))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantize")
@pytest.mark.parametrize("steps", [8, 15, 19])
def test_a_quantised_copy_has_the_zeros_of_the_run_and_leaves_it_alone(steps: int) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("needs an engine of quantised operations")
    ends = []
    for quantising in (False, True):
        torch.manual_seed(0)
        model = TwoTasks()
        pruner = prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, pruner, optimizer, range(steps))
        if quantising:
            linear = {nn.Linear}
            quantised = torch.ao.quantization.quantize_dynamic(
                copy.deepcopy(model), linear, dtype=torch.qint8
            )
            x = batch(0)[0]
            expected = model(x)
            for task, out in quantised(x).items():
                torch.testing.assert_close(out, expected[task], rtol=0.1, atol=0.1)
            zero = model.body.weight == 0
            assert zero.any()
            assert not quantised.body.weight().dequantize()[zero].any()
            # What its pruner would report are the float weights, with which it does not compute.
            for look in (quantised.adapmtl.report, quantised.adapmtl.fix_zeros):
                with pytest.raises(RuntimeError, match=r"'body\.weight' is no longer in the model"):
                    look()
            before = quantised(x)
            quantised.adapmtl.undo()  # then it can be pickled
            assert all(torch.equal(out, before[task]) for task, out in quantised(x).items())
            torch.save(quantised, io.BytesIO())
        train(model, pruner, optimizer, range(steps, 20))
        pruner.finalize()
        ends.append(tensors(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class _Tied(TwoTasks):
    """Holds the weight of its first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(6, 12)
        self.twin.weight = self.body.weight


@pytest.mark.parametrize("when", ["after an error", "in a hook of the optimiser"])
@pytest.mark.parametrize("steps", [8, 19])  # before and after the zeros are fixed
def test_a_state_that_is_saved_while_weights_are_dense_holds_sparse_ones(
    steps: int, when: str
) -> None:
    model, plain, fresh = _Tied(), _Tied(), _Tied()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, pruner, optimizer, range(steps))
    states = []

    def save(*_: object) -> None:
        states.append(copy.deepcopy(model.state_dict()))
        if when == "after an error":
            raise KeyboardInterrupt

    optimizer.register_step_post_hook(save)
    pruner.loss(losses(model, steps)).backward()
    if when == "after an error":
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        states = [model.state_dict()]
    else:
        optimizer.step()
    plain.load_state_dict(plain_state_dict(states[0]))
    x = batch(0)[0]
    expected = model(x)
    assert all(torch.equal(out, expected[task]) for task, out in plain(x).items())
    names = [layer.name for layer in pruner.layers]
    saved = [plain_state_dict(states[0])[name] for name in names]
    assert sum(int((weight == 0).sum()) for weight in saved) == zeros(pruner) > 0
    prepare(fresh)
    fresh.load_state_dict(states[0])
    _assert_equal(fresh, model)  # the residuals too


@pytest.mark.parametrize("part", ["heads", "body"])
@pytest.mark.parametrize("stop", [12, 20])
def test_plain_weights_of_a_part_replace_those_of_the_run(stop: int, part: str) -> None:
    """As dense weights; the thresholds and fixed zeros stay."""
    model, source = TwoTasks(), TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(stop))
    thresholds = pruner.controller.thresholds()
    with pruner.sparse_weights.dense():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = source.get_submodule(part).state_dict()
    model.get_submodule(part).load_state_dict(state)
    wanted = {**before, **{f"{part}.{key}": value for key, value in state.items()}}
    if stop == 20:
        for layer in pruner.layers:
            wanted[layer.name] = torch.where(layer.mask, wanted[layer.name], 0.0)
    pruner.sparse_weights.to_sparse()
    x = batch(5)[0]
    outputs = model(x)
    with pruner.sparse_weights.dense():
        assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())
    assert all(torch.equal(out, outputs[task]) for task, out in model(x).items())
    assert torch.equal(pruner.controller.thresholds(), thresholds)
    train(model, pruner, optimizer, range(stop, 20))
    assert zeros(pruner) == round(0.8 * weights(pruner))
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))


@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_of_the_whole_are_refused(strict: bool, options: dict[str, Any]) -> None:
    """And nothing is loaded, not even of the layer before that is not pruned."""
    model, state = TwoTasks(), TwoTasks().state_dict()
    model.body.weight.requires_grad_(False)
    prepare(model, **options)

    def misuse() -> None:
        with pytest.raises(ValueError, match=r"'heads.a.weight' of the model without .*undo"):
            model.load_state_dict(state, strict=strict)

    assert_untouched(model, misuse)


def test_plain_weights_of_a_part_are_refused_where_thresholds_are_trained() -> None:
    model, state = TwoTasks(), TwoTasks().heads["b"].state_dict()
    prepare(model, allocation="gradient")

    def misuse() -> None:
        with pytest.raises(ValueError, match=r"'weight' of the model without apply_adapmtl"):
            model.heads["b"].load_state_dict(state, strict=False)

    assert_untouched(model, misuse)


# --- copies -------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("stop", [0, 8, 13])
def test_a_copy_has_its_own_handle(duplicate: Any, stop: int) -> None:
    model = TwoTasks()
    pruner = prepare(model, **RUN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for step in range(stop):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    twin = duplicate(model)
    own = twin.adapmtl
    assert isinstance(own, Pruner)
    assert own is not pruner
    _assert_equal(twin, model)

    before = tensors(model)
    train(twin, own, torch.optim.SGD(twin.parameters(), lr=0.1), range(stop, 40))  # not attached
    assert pruner.report().step == stop
    assert all(torch.equal(value, before[key]) for key, value in tensors(model).items())
    for step in range(stop, 40):
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    _assert_equal(twin, model)

    own.fix_zeros()
    own.finalize()
    assert zeros(own) == round(0.8 * weights(own))
    assert zeros(pruner) < weights(pruner)
    assert list(twin.state_dict()) == list(TwoTasks().state_dict())
    assert model.adapmtl is pruner
    pruner.fix_zeros()
    pruner.finalize()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in tensors(model).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_a_copy_of_the_end_and_of_the_plain_model(duplicate: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    pruner.fix_zeros()
    twin = duplicate(model)
    twin.adapmtl.finalize()
    pruner.finalize()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in tensors(model).items())
    assert list(duplicate(model).state_dict()) == list(model.state_dict())


def test_a_state_keeps_its_size() -> None:
    """States are copied into each other, by averages and by distributed checkpoints."""
    model = TwoTasks()
    pruner = prepare(model, total_steps=1200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapes = {key: value.shape for key, value in tensors(model).items()}
    for step in range(1200):
        if step in (1, 100, 839):
            train(model, pruner, optimizer, [step])
            assert {key: value.shape for key, value in tensors(model).items()} == shapes
        else:
            pruner.step()
    assert pruner.controller.fixed
    assert {key: value.shape for key, value in tensors(model).items()} == shapes


@pytest.mark.parametrize("stop", [0, 8, 20])
@pytest.mark.parametrize("kind", ["AveragedModel", "with buffers", "timm"])
def test_an_average_ends_exactly_as_sparse(kind: str, stop: int) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, optimizer, range(stop))
    average: Any
    if kind == "timm":
        average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)
    else:
        half = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=half, use_buffers=kind == "with buffers"
        )
    update = average.update if kind == "timm" else average.update_parameters
    for step in range(stop, 20):
        train(model, pruner, optimizer, [step])
        update(model)
    for step in (20, 21):  # nothing but training is left
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        update(model)
    own = average.module.adapmtl
    own.load_state_dict(pruner.state_dict())
    before = average.module.body.weight.clone()
    sparse = own.finalize()
    pruner.finalize()
    assert sum(int((p == 0).sum()) for p in sparse.parameters() if p.ndim == 2) == round(0.8 * 168)
    for mine, theirs in zip(sparse.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine == 0, theirs == 0) or mine.ndim < 2
    assert torch.equal(sparse.body.weight, before)
    assert not torch.equal(sparse.body.weight, model.body.weight)


def test_averaged_weights() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = average.module.adapmtl
    for step in range(20):
        train(model, pruner, optimizer, [step])
        average.update_parameters(model)
        if step in (8, 14, 19):
            own.load_state_dict(pruner.state_dict())
            assert torch.equal(own.controller.thresholds(), pruner.controller.thresholds())
            assert 0 < own.sparsity() <= pruner.sparsity()
    sparse = own.finalize()
    assert sum(int((p == 0).sum()) for p in sparse.parameters() if p.ndim == 2) == round(0.8 * 168)
    pruner.finalize()


# --- moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_keep_their_precision(dtype: torch.dtype) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(10))
    statistics = {k: v for k, v in tensors(pruner).items() if v.is_floating_point()}
    assert statistics
    model.to(dtype)
    for key, value in tensors(pruner).items():
        if "residual" in key:  # a part of the weight
            assert value.dtype == dtype
        else:
            assert key not in statistics or torch.equal(value, statistics[key])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.body.weight.dtype == dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(10, 20):
        x, targets = batch(step)
        out = model(x.to(dtype))
        found = {task: (out[task] - y.to(dtype)).square().mean() for task, y in targets.items()}
        pruner.loss(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert zeros(pruner) == round(0.8 * weights(pruner))
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * weights(pruner))
