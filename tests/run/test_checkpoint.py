"""What is loaded into a run: its own states, those of runs that behave alike, and no others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusals import STEPS, Row, Scene, assert_refused, rows, running
from torch import Tensor, nn
from toys import TwoTasks, prepare, tensors, train
from untouched import assert_untouched

from torch_adapmtl import (
    Adaptive,
    DiSparse,
    LAMPAllocation,
    Magnitude,
    Paper,
    SparsitySchedule,
    StabilityWeighting,
)
from torch_adapmtl.run._packing import pack, unpack

V = ValueError


def load(change: Callable[[dict[str, Any]], Any], **options: Any) -> Callable[[Scene], object]:
    """Load the state of another run, changed."""

    def passed(scene: Scene) -> None:
        with torch.random.fork_rng():
            other = TwoTasks()
            pruner = prepare(other, **{"total_steps": STEPS, **options})
            train(other, pruner, torch.optim.SGD(other.parameters(), lr=0.1), range(5))
            state = copy.deepcopy(other.state_dict())
            state = change(state) or state
        scene.model.load_state_dict(state)

    return passed


OWN = "adapmtl._extra_state"


def own(change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({OWN: change(state[OWN])})


def header(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Another header, or other progress, of a run without masks."""

    def change(packed: Tensor) -> Tensor:
        settings, progress, masks = unpack(packed)
        for name, value in changes.items():
            (progress if name in progress else settings)[name] = value
        return pack(settings, progress, masks, [0] * len(masks))

    return own(change)


def shaped(key: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: torch.ones(shape)})


def foreign(**options: Any) -> Callable[[Scene], object]:
    return load(lambda state: None, **options)


EARLY = SparsitySchedule(end=0.3)
DAMAGED = "load another checkpoint"
ALIKE = "prepare it alike"
STATES = [
    running("another end of a baseline", foreign(method=Magnitude(schedule=EARLY)), V,
            "method.schedule.end=0.3", "method.schedule.end=None", ALIKE,
            options={"method": Magnitude()}),
    running("another scope of a baseline", foreign(method=Magnitude("uniform")), V,
            "method.scope='uniform'", "method.scope='global'", ALIKE,
            options={"method": Magnitude()}),
    *(
    running(id, do, V, named, found, remedy)
    for id, do, named, found, remedy in (
        ("another target", foreign(target_sparsity=0.7), "target_sparsity=0.7",
         "target_sparsity=0.8", ALIKE),
        ("other steps", foreign(total_steps=30), "total_steps=30", f"total_steps={STEPS}", ALIKE),
        ("other tensors", foreign(exclude=["heads.b"]), "the state dict", "'heads.b.weight': 'b'",
         "prepare the model alike (groups"),
        ("other components", foreign(groups={"b": ["heads.a"]}), "the state dict",
         "'heads.a.weight': 'b'", "prepare the model alike (groups"),
        ("another granularity", foreign(granularity="component"), "method.granularity='component'",
         "method.granularity='layer'", ALIKE),
        ("another method", foreign(method="paper"), "method.name='Paper'",
         "method.name='Adaptive'", ALIKE),
        ("another allocation", foreign(allocation="sensitivity"), "method.allocation.name",
         "'SensitivityAllocation'", ALIKE),
        ("a common threshold", foreign(allocation="common"), "method.allocation.name",
         "'CommonAllocation'", ALIKE),
        ("another strength", foreign(allocation=LAMPAllocation(strength=0.25)),
         "method.allocation.strength=0.25", "method.allocation.strength=", ALIKE),
        ("another schedule", foreign(schedule=SparsitySchedule(end=0.3, regrow_until=0.7)),
         "method.schedule.end=0.3", "method.schedule.end=None", ALIKE),
        ("another reach", foreign(reach=2.0), "method.reach=2.0", "method.reach=None", ALIKE),
        ("another floor", foreign(min_density=0.01), "method.min_density=0.01",
         "method.min_density=None", ALIKE),
        ("another window", foreign(weighting=StabilityWeighting(["a", "b"], window=3, start=0)),
         "weighting.window=3", "weighting.window=10", ALIKE),
        ("another weighting", foreign(weighting="equal"), "weighting.name='FixedWeighting'",
         "weighting.name='StabilityWeighting'", ALIKE),
        ("another direction", foreign(weighting="deviation"), "weighting.direction='deviating'",
         "weighting.direction='stable'", ALIKE),
        *(
            (f"version {version}", load(header(version=version)), "adapmtl state",
             f"version {version}, this version of torch-adapmtl reads 5",
             "the version that it was saved with")
            for version in (4, 99)
        ),
        ("another width", load(shaped("body.weight", 9, 6)), "body.weight", "shape (9, 6)",
         "make the model alike"),
        ("a residual of another width", load(shaped("adapmtl.sparse_weights.residual_1", 5, 11)),
         "adapmtl.sparse_weights.residual_1", "shape (5, 11)", "prepare the model alike"),
        ("a plain state", load(lambda state: TwoTasks().state_dict()), "the state dict",
         "'body.weight'", "before apply_adapmtl, or after finalize() or undo()"),
        ("without a weight", load(lambda state: state.pop("body.weight") is None),
         "the state dict", "no 'body.weight'", "the state dict of the whole model"),
        ("a negative step", load(header(step=-1)), OWN, "step=-1", DAMAGED),
        ("a step in words", load(header(step="three")), OWN, "step='three'", DAMAGED),
        ("a history of words", load(header(history=["a", 1, 2, 3])), OWN, "history=['a'", DAMAGED),
        ("a history without end", load(header(history=[257, 1, 2, 3])), OWN, "history=[257",
         DAMAGED),
        ("no layers", load(header(layers=None)), OWN, "names no layers", DAMAGED),
        ("no bytes", load(own(lambda packed: packed[:0])), OWN, "0 bytes cannot be read", DAMAGED),
        ("too few bytes", load(own(lambda packed: packed[:-1])), OWN, "cannot be read", DAMAGED),
        ("too many", load(own(lambda packed: packed.repeat(2))), OWN, "cannot be read", DAMAGED),
        ("floats", load(own(lambda packed: packed.float())), OWN, "torch.float32", DAMAGED),
        ("rows of bytes", load(own(lambda packed: packed[None])), OWN, "shape (1,", DAMAGED),
        ("no tensor", load(own(lambda packed: {})), OWN, "it is a dict", DAMAGED),
        ("no data", load(own(lambda packed: packed.to("meta"))), OWN, "on meta", DAMAGED),
    )
    ),
]  # fmt: skip


@rows(STATES)
def test_refused(row: Row) -> None:
    assert_refused(row)


def test_other_fixed_weights_are_refused() -> None:
    model, other = TwoTasks(), TwoTasks()
    prepare(other, weighting={"a": 9, "b": 1})
    prepare(model, weighting={"a": 1, "b": 9})

    def misuse() -> None:
        where = r"weighting\.weights\.a="
        text = (
            rf"{where}1\.(8|79)\d*, this model was prepared with {where}0\.2\d*: prepare it alike"
        )
        with pytest.raises(ValueError, match=text):
            model.load_state_dict(other.state_dict())

    assert_untouched(model, misuse)


def test_another_gradient_is_refused_by_its_name() -> None:
    model, other = TwoTasks(), TwoTasks()
    prepare(other, gradient="mask")
    prepare(model)
    with pytest.raises(ValueError, match=r"method\.gradient='mask'"):
        model.load_state_dict(other.state_dict())


ALIKE_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights of the same ratio": (
        {"weighting": {"a": 2, "b": 6}},
        {"weighting": {"a": 1, "b": 3}},
    ),
    "equal weights by name and by number": (
        {"weighting": "equal"},
        {"weighting": {"a": 1, "b": 1}},
    ),
    "the default by its object and by its name": (
        {"method": Adaptive()},
        {"method": "adaptive"},
    ),
    "the paper's by its object and by its name": ({"method": Paper()}, {"method": "paper"}),
    "an allocation by its object and by its name": (
        {"method": Adaptive(allocation=LAMPAllocation())},
        {"method": Adaptive(allocation="lamp")},
    ),
    "numbers of NumPy": (
        {
            "target_sparsity": np.float64(0.8),
            "total_steps": np.int64(STEPS),
            "method": Adaptive(
                schedule=SparsitySchedule(end=np.float64(0.5)), reach=np.float32(2),
                min_density={"a": np.float16(0.25)},
            ),
            "weighting": {"a": np.float32(3), "b": np.int64(1)},
        },
        {
            "target_sparsity": 0.8,
            "method": Adaptive(
                schedule=SparsitySchedule(end=0.5), reach=2, min_density={"a": 0.25}
            ),
            "weighting": {"a": 0.75, "b": 0.25},
        },
    ),
    "bounds that bound nothing": (
        {"method": Adaptive(min_density=0.0, max_density={"a": 1.0})},
        {"method": Adaptive(max_density={"b": None})},
    ),
    "a time that has no effect": (
        {"method": Magnitude(schedule=SparsitySchedule(fix_at=0.95, regrow_until=0.6))},
        {"method": Magnitude()},
    ),
    "a time until which masked gradients are let through": (
        {"method": Adaptive(gradient="mask", schedule=SparsitySchedule(regrow_until=0.6))},
        {"method": Adaptive(gradient="mask")},
    ),
    "settings of masks that do not move": (
        {"method": DiSparse(fraction=0.5, interval=3)},
        {"method": DiSparse()},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:no weight is left", "ignore:the run ended at a sparsity")
@pytest.mark.parametrize("name", ALIKE_RUNS)
def test_what_behaves_alike_is_loaded_and_goes_on_alike(name: str) -> None:
    ends = []
    for first, second in (ALIKE_RUNS[name], ALIKE_RUNS[name][::-1]):
        torch.manual_seed(0)
        model, fresh = TwoTasks(), TwoTasks()
        pruner = prepare(model, **{"total_steps": STEPS, **first})
        train(model, pruner, torch.optim.SGD(pruner.param_groups(lr=0.1)), range(5))
        other = prepare(fresh, **{"total_steps": STEPS, **second})
        fresh.load_state_dict(model.state_dict())
        train(fresh, other, torch.optim.SGD(other.param_groups(lr=0.1)), range(5, STEPS))
        ends.append(tensors(other.finalize()))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_larger_state(strict: bool) -> None:
    """The model may be a part of another: what comes before it is loaded by then, nothing of it."""
    model, other = TwoTasks(), TwoTasks()
    prepare(model, target_sparsity=0.7)
    prepare(other)
    whole, state = nn.ModuleDict({"net": other}), nn.ModuleDict({"net": model}).state_dict()

    def misuse() -> None:
        with pytest.raises(ValueError, match=r"target_sparsity=0\.7, .*=0\.8: prepare it alike"):
            whole.load_state_dict(state, strict=strict)

    assert_untouched(other, misuse)


def test_what_torch_refuses() -> None:
    """A tensor that is not ours is torch's to refuse: it says what is wrong, but loads the rest."""
    model = TwoTasks()
    prepare(model)
    state = copy.deepcopy(model.state_dict())
    state["body.bias"] = torch.ones(3)
    handle = tensors(model.adapmtl)
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.bias"):
        model.load_state_dict(state)
    assert all(torch.equal(value, handle[key]) for key, value in tensors(model.adapmtl).items())
    del state["body.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*body\.bias"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_states_too_and_plain_models_no_more(duplicate: Any) -> None:
    model = TwoTasks()
    plain = copy.deepcopy(model.state_dict())
    prepare(model)
    twin = duplicate(model)
    twin.adapmtl.fix_zeros()
    twin.adapmtl.finalize()
    assert not twin._load_state_dict_pre_hooks
    twin.load_state_dict(plain)
    with pytest.raises(ValueError, match=r"'body\.weight' of the model without apply_adapmtl"):
        duplicate(model).load_state_dict(plain)


class Ordered(nn.Module):
    """Two equal layers, whose order is that in which they are made."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.get_submodule("first")(x), "b": self.get_submodule("second")(x)}


def test_a_state_of_layers_in_another_order_is_refused() -> None:
    model, swapped = Ordered("first", "second"), Ordered("second", "first")
    prepare(model).fix_zeros()
    prepare(swapped)
    state = copy.deepcopy(model.state_dict())

    def misuse() -> None:
        with pytest.raises(
            ValueError, match=r"in another order, \['first.weight', 'second.weight'\]"
        ):
            swapped.load_state_dict(state)

    assert_untouched(swapped, misuse)
