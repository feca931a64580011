"""Starting from a sparse model, going on to another target, and finetuning with zeros kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import TwoTasks, batch, losses, prepare, pruned, tensors, train, weights, zeros

from torch_adapmtl import (
    SNIP,
    Adaptive,
    DiSparse,
    Magnitude,
    Paper,
    Pruner,
    SparsitySchedule,
    Taylor,
    apply_adapmtl,
    keep_zeros,
    release_zeros,
)

NAMES = ("body.weight", "heads.a.weight", "heads.b.weight")


def sparse_model(sparsity: float = 0.6) -> TwoTasks:
    """A model of which that share of the weights is zero."""
    model = TwoTasks()
    pruner = prepare(model, target_sparsity=sparsity)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    pruner.finalize()
    return model


def gone(model: nn.Module) -> dict[str, Tensor]:
    """Where the parameters of a model without thresholds are zero."""
    return {name: model.get_parameter(name) == 0 for name in NAMES}


def count(where: dict[str, Tensor]) -> int:
    return sum(int(zero.sum()) for zero in where.values())


def seen(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with."""
    found = {}
    for name in NAMES:
        path, _, last = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), last).detach().clone()
    return found


def assert_within(model: nn.Module, where: dict[str, Tensor]) -> None:
    assert all(not seen(model)[name][zero].any() for name, zero in where.items())


# --- from a sparse model ------------------------------------------------------------------------


METHODS: dict[str, dict[str, Any]] = {
    "lamp": {},
    "sensitivity": {"allocation": "sensitivity"},
    "gradient": {"allocation": "gradient"},
    "common": {"allocation": "common", "granularity": "component"},
    "magnitude": {"method": Magnitude(scope="global")},
    "uniform": {"method": Magnitude(scope="uniform")},
    "taylor": {"method": Taylor()},
    "snip": {"method": SNIP()},
    "disparse": {"method": DiSparse(dynamic=True)},
}


@pytest.mark.filterwarnings("ignore:no weight is left")  # of so few, and by these baselines
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_and_count(method: str) -> None:
    model = sparse_model()
    before, start = gone(model), count(gone(model))
    assert start == round(0.6 * 168)
    pruner = prepare(model, target_sparsity=0.9, total_steps=40, **METHODS[method])
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, weight_decay=0.1))
    for step in range(40):
        assert zeros(pruner) >= start
        assert_within(model, before)
        train(model, pruner, optimizer, [step])
    assert zeros(pruner) == round(0.9 * 168)
    pruner.finalize()
    assert_within(model, before)
    assert count(gone(model)) == round(0.9 * 168)


def test_papers_mode_keeps_them_too() -> None:
    model = sparse_model()
    before = gone(model)
    pruner = prepare(model, target_sparsity=0.7, method=Paper(start=-4.0, weight_decay=0.1))
    train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=0.1)), range(20))
    assert_within(model, before)


@settings(max_examples=40)
@given(
    start=st.floats(0.0, 0.95),
    more=st.floats(0.0, 1.0),
    initial=st.floats(0.0, 0.9),
    shape=st.sampled_from(["cubic", "linear", "cosine"]),
    dense=st.booleans(),
)
def test_the_schedule_goes_on_from_what_is_there(
    start: float, more: float, initial: float, shape: Any, dense: bool
) -> None:
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False))
    given = torch.rand(900) < start
    with torch.no_grad():
        for weight, zero in zip(model.parameters(), given.split([600, 300]), strict=True):
            if not zero.all():  # else it has yet to be trained
                weight.view(-1)[zero] = 0.0
    share = sum(int((weight == 0).sum()) for weight in model.parameters()) / 900
    target = share + more * (0.98 - share)
    schedule = SparsitySchedule(start=0.0, end=0.8, initial=initial, shape=shape)
    pruner = apply_adapmtl(
        model,
        target_sparsity=target,
        total_steps=30,
        groups={"main": ["*"]},
        method=Adaptive(allocation="common", schedule=schedule),
    )
    wanted = max(share, min(initial, target))
    previous = 0.0
    for step in range(1, 31):
        pruner.step()
        now = pruner.sparsity()
        due = schedule(step, 30, target, wanted)
        # Weights may tie with the level, and floors hold some layers back.
        assert due - 0.02 <= now <= due + 2 / 900 or step == 30
        assert now >= max(share, previous) - 2 / 900
        previous = now
    assert zeros(pruner) == round(target * 900)


def test_a_report_says_what_was_there() -> None:
    pruner = prepare(sparse_model(), target_sparsity=0.9)
    assert pruner.report().given == 101
    assert "zero before the run, and kept so: 101 weights" in str(pruner.report())
    assert "kept so" in pruner.report()._repr_html_()
    assert "kept so" not in str(prepare(TwoTasks()).report())


def test_a_tensor_that_is_zero_throughout_learns() -> None:
    model = TwoTasks()
    nn.init.zeros_(model.heads["b"].weight)
    pruner = prepare(model, target_sparsity=0.5)
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20))
    assert zeros(pruner) == 84
    assert model.heads["b"].weight.any()


def test_zeros_may_return_if_asked() -> None:
    model = sparse_model()
    before = gone(model)
    pruner = prepare(model, target_sparsity=0.3, keep_zeros=False)
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20))
    assert zeros(pruner) == round(0.3 * 168)
    assert any(seen(model)[name][zero].any() for name, zero in before.items())


def test_a_target_below_what_is_there_is_refused() -> None:
    model = sparse_model()
    keys, before = list(model.state_dict()), tensors(model)
    with pytest.raises(ValueError, match=r"(?s)asks for 50 zeros.*the 101 weights .*keep_zeros=F"):
        prepare(model, target_sparsity=0.3)
    with pytest.raises(ValueError, match=r"asks for 50 zeros, .* hold 101"):
        prepare(model, target_sparsity=0.3, method=Taylor())
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in tensors(model).items())


def test_masks_of_torch_and_zeros_of_ours_are_both_kept() -> None:
    model = sparse_model()
    before = gone(model)
    mask = (torch.rand(12, 6) > 0.2).float()
    prune.custom_from_mask(model.body, "weight", mask)
    pruner = prepare(model, target_sparsity=0.9)
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=1e-2), range(20))
    before["body.weight"] |= mask == 0
    assert_within(model, before)
    pruner.finalize()
    assert torch.equal(model.body.weight_mask, mask)  # torch's, without what was zero besides
    assert_within(model, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 11, 35])
def test_a_loaded_run_goes_on_bit_for_bit(stop: int, method: str) -> None:
    """Also in a model that was prepared from other weights, dense ones."""
    run: dict[str, Any] = {"target_sparsity": 0.9, "total_steps": 40, **METHODS[method]}
    model, fresh = sparse_model(), TwoTasks()
    pruner = prepare(model, **run)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
    train(model, pruner, optimizer, range(stop))
    state = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(stop, 40))
    other = prepare(fresh, **run)
    fresh.load_state_dict(state)
    train(fresh, other, torch.optim.SGD(other.param_groups(lr=0.1)), range(stop, 40))
    assert all(torch.equal(value, tensors(fresh)[key]) for key, value in tensors(model).items())


def test_zeros_that_were_given_are_known_after_a_resume() -> None:
    model, fresh = sparse_model(0.4), TwoTasks()
    before = gone(model)
    prepare(model, target_sparsity=0.9).fix_zeros()
    other = prepare(fresh, target_sparsity=0.9)
    fresh.load_state_dict(model.state_dict())
    other.retarget(0.5, total_steps=20)
    train(fresh, other, torch.optim.Adam(fresh.parameters(), lr=1e-2), range(20))
    assert zeros(other) == 84
    assert_within(fresh, before)


# --- to another target --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:all components are equally")  # of so few weights some are
@pytest.mark.parametrize("options", [{}, {"allocation": "gradient"}, {"granularity": "component"}])
@pytest.mark.parametrize("stop", [0, 7, 20])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 0.95])
def test_another_target_is_met_exactly(target: float, stop: int, options: Any) -> None:
    model = TwoTasks()
    pruner = prepare(model, **options)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
    train(model, pruner, optimizer, range(stop))
    before, x = pruner.sparsity(), batch(99)[0]
    outputs = model(x)
    where = {name: weight == 0 for name, weight in seen(model).items()}
    pruner.retarget(target, total_steps=30)
    assert pruner.sparsity() == pytest.approx(before, abs=0.03)
    if stop == 20:  # the zeros had settled: nothing jumps
        for task, out in model(x).items():
            torch.testing.assert_close(out, outputs[task])
    low, high = sorted((before, target))
    for step in range(30):
        train(model, pruner, optimizer, [step])
        assert low - 0.03 <= pruner.sparsity() <= high + 0.03
    assert zeros(pruner) == round(target * 168)
    if stop == 20 and target >= 0.8:
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
    assert pruner._step == 0
    pruner.loss(losses(model, 0)).backward()
    optimizer.step()
    assert pruner._step == 1
    pruner.detach()
    assert pruner._step == 1


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


@pytest.mark.parametrize("method", ["paper", Taylor()], ids=str)
def test_what_has_no_schedule_of_ours_is_not_retargeted(method: Any) -> None:
    pruner = prepare(TwoTasks(), method=method)
    with pytest.raises(RuntimeError, match=r"retarget\(\) needs method='adaptive'.*finalize"):
        pruner.retarget(0.9, total_steps=10)
    assert (pruner.target_sparsity, pruner.total_steps) == (0.8, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sparsity": 1.0, "total_steps": 5}, r"target_sparsity .* got 1.0; 90 % is 0.9"),
        ({"target_sparsity": 0.5, "total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
    ],
)
def test_refused_targets(arguments: Any, message: str) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        pruner.retarget(**arguments)
    assert all(torch.equal(value, before[key]) for key, value in tensors(model).items())


# --- after the end ------------------------------------------------------------------------------


def finetune(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(10):
        sum(losses(model, step).values()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("momentum", ["fresh", "old"])
def test_nothing_revives_a_zero(make: Any, momentum: str) -> None:
    model = TwoTasks()
    pruner = prepare(model)
    optimizer = make(model.parameters())
    train(model, pruner, optimizer, range(20))
    pruner.finalize()
    keys, where, before = list(model.state_dict()), gone(model), seen(model)
    x = batch(99)[0]
    outputs = model(x)
    if momentum == "old":
        finetune(model, optimizer)  # without the zeros held: they do not stay
        assert count(gone(model)) < count(where)
        model.load_state_dict({**model.state_dict(), **before}, strict=False)
        outputs = model(x)
    else:
        optimizer = make(model.parameters())
    assert keep_zeros(model) is model
    assert all(torch.equal(out, outputs[task]) for task, out in model(x).items())
    finetune(model, optimizer)
    assert count({name: weight == 0 for name, weight in seen(model).items()}) == count(where)
    assert_within(model, where)
    assert any(not torch.equal(weight, before[name]) for name, weight in seen(model).items())
    outputs = model(x)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert release_zeros(one) is one
        assert list(one.state_dict()) == keys
        assert not prune.is_pruned(one)
        assert type(one.body) is nn.Linear
        assert all(torch.equal(out, outputs[task]) for task, out in one(x).items())
        assert count(gone(one)) == count(where)


def test_kept_zeros_are_saved() -> None:
    model = keep_zeros(sparse_model())
    finetune(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fresh = keep_zeros(sparse_model(0.5))  # other zeros
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(weight, seen(model)[name]) for name, weight in seen(fresh).items())
    mine, theirs = gone(release_zeros(fresh)), gone(release_zeros(model))
    assert all(torch.equal(zero, theirs[name]) for name, zero in mine.items())


def test_which_tensors_keep_their_zeros() -> None:
    model = sparse_model()
    model.words = nn.Embedding(5, 4, padding_idx=0)
    model.new = nn.Linear(4, 4)
    nn.init.zeros_(model.new.weight)  # not trained yet
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    prune.random_unstructured(model.heads["a"], "weight", 0.5)
    mask = model.heads["a"].weight_mask.clone()
    keep_zeros(model)
    held = {name.split(".parametrizations")[0] for name in model.state_dict() if "alpha" in name}
    assert held == {"body", "twin", "heads.a", "heads.b"}
    release_zeros(model)
    assert model.twin.weight is model.body.weight
    assert torch.equal(model.heads["a"].weight_mask, mask)


def test_when_zeros_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"TwoTasks has no tensor with zeros.*after finalize"):
        keep_zeros(TwoTasks())
    model = TwoTasks()
    pruner = prepare(model)
    for call in (keep_zeros, release_zeros):
        with pytest.raises(RuntimeError, match=r"being pruned; call finalize\(\) on its pruner"):
            call(model)
    pruner.fix_zeros()
    pruner.finalize()
    keep_zeros(model)
    with pytest.raises(RuntimeError, match=r"'body.weight' has .* already; .*release_zeros"):
        keep_zeros(model)
    with pytest.raises(ValueError, match=r"'body.weight' has .* already, .*release_zeros"):
        prepare(model)
    handle = prepare(release_zeros(model), target_sparsity=0.9)
    assert isinstance(handle, Pruner)
    assert zeros(handle) == round(0.8 * weights(handle))
    assert len(pruned(handle)) == 3


class Adapted(nn.Linear):
    """A linear layer with a low-rank part of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.low = nn.Parameter(torch.randn(2, width))


def test_tensors_of_subclasses_and_embeddings() -> None:
    model = nn.ModuleDict({"a": Adapted(4), "words": nn.Embedding(5, 3, padding_idx=0)})
    with torch.no_grad():
        model["a"].low[0] = 0.0
    keep_zeros(model)
    assert model["a"].low.requires_grad
    assert not torch.nn.utils.parametrize.is_parametrized(model["a"], "weight")
    assert not torch.nn.utils.parametrize.is_parametrized(model["words"])
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert not release_zeros(model)["a"].low[0].any()

    model["words"].sparse = True
    with torch.no_grad():
        model["words"].weight[2] = 0.0
    with pytest.raises(ValueError, match=r"'words.weight' has zeros and sparse gradients .*False"):
        keep_zeros(model)
    assert not torch.nn.utils.parametrize.is_parametrized(model["a"])


def test_only_masks_of_keep_zeros_are_released() -> None:
    model = TwoTasks()
    prepare(model)
    release_zeros(model.body)  # a part of a model that is being pruned
    assert prune.is_pruned(model.body)


def test_kept_zeros_train_after_inference_mode() -> None:
    model, other = sparse_model(), TwoTasks()
    prepare(other).fix_zeros()
    state = copy.deepcopy(other.state_dict())
    prepared = TwoTasks()
    prepare(prepared)
    with torch.inference_mode():
        keep_zeros(model)
        prepared.load_state_dict(state)
    finetune(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finetune(prepared, torch.optim.SGD(prepared.parameters(), lr=0.1))


def test_a_tied_weight_that_is_masked_in_one_place_is_refused() -> None:
    model = TwoTasks()
    model.twin = nn.Linear(6, 12)
    model.twin.weight = model.body.weight
    prune.custom_from_mask(model.twin, "weight", (torch.rand(12, 6) > 0.5).float())
    with pytest.raises(ValueError, match=r"'body.weight' is tied, .* the 2 modules .*same mask"):
        prepare(model, groups={"a": ["heads.a"], "b": ["heads.b"], "shared": ["body"]})
