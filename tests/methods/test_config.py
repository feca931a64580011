"""The config of methods: what JSON can hold, equal where two methods behave alike, and else not."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from refusals import Row, assert_refused, call, raises
from torch import nn

from torch_adapmtl import (
    ACDC,
    SNIP,
    ST3,
    STR,
    Adaptive,
    Controller,
    DiSparse,
    Feather,
    GradientAllocation,
    GraNet,
    IterativeMagnitude,
    LAMPAllocation,
    Layers,
    Magnitude,
    Method,
    Paper,
    RigL,
    SensitivityAllocation,
    SparsitySchedule,
    Taylor,
    TopKAST,
)
from torch_adapmtl.allocation._base import CommonAllocation

FRACTION, POSITIVE = st.floats(0, 1, exclude_max=True), st.floats(1e-3, 1e3)


@st.composite
def schedules(draw: st.DrawFn) -> SparsitySchedule:
    if draw(st.booleans()):  # an end that depends on the target
        return SparsitySchedule(start=draw(st.floats(0, 0.5)), fix_at=draw(st.floats(0.5, 1)))
    start, end, regrow_until, fix_at = sorted(draw(st.tuples(*[st.floats(0, 1)] * 4)))
    return SparsitySchedule(
        start=start, end=end, initial=draw(FRACTION),
        shape=draw(st.sampled_from(["cubic", "linear", "cosine"])),
        fix_at=draw(st.sampled_from([None, fix_at])) if end <= 0.9 else fix_at,
        regrow_until=None if fix_at > 0.9 else regrow_until,
    )  # fmt: skip


ALLOCATIONS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    LAMPAllocation: {"strength": FRACTION, "rate": st.floats(1e-3, 1), "bound": POSITIVE},
    SensitivityAllocation: {
        "rate": POSITIVE, "bound": POSITIVE, "decay": FRACTION, "prior": POSITIVE,
    },
    GradientAllocation: {"bound": POSITIVE},
    CommonAllocation: {},
}  # fmt: skip
DENSITY = (
    st.none()
    | st.sampled_from([0.0, 1.0])
    | FRACTION
    | st.dictionaries(
        st.sampled_from(["shared", "a"]), st.none() | st.sampled_from([0.0, 1.0]) | FRACTION
    )
)
GRADIENT = st.sampled_from(["straight_through", "mask"])
METHODS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    Adaptive: {
        "schedule": schedules(),
        "granularity": st.sampled_from(["layer", "component"]),
        "allocation": st.sampled_from(["lamp", "sensitivity", "gradient", "common"])
        | st.one_of(*(st.builds(make, **own) for make, own in ALLOCATIONS.items())),
        "gradient": GRADIENT,
        "reach": st.floats(1.01, 9) | st.just(math.inf),
        "min_density": DENSITY,
        "max_density": DENSITY,
    },
    Paper: {"start": st.floats(-30, 0), "weight_decay": FRACTION, "gradient": GRADIENT},
    Magnitude: {"scope": st.sampled_from(["global", "uniform"]), "schedule": schedules()},
    Taylor: {"schedule": schedules(), "decay": FRACTION},
    ST3: {"schedule": schedules()},
    STR: {"start": st.floats(-30, 0), "weight_decay": FRACTION, "fix_at": FRACTION},
    Feather: {
        "power": st.floats(1, 9),
        "theta": st.none() | st.floats(0, 1),
        "schedule": schedules(),
    },
    SNIP: {"batches": st.integers(1, 9)},
    IterativeMagnitude: {"rounds": st.integers(1, 9), "rewind": st.booleans()},
    ACDC: {
        "warmup": st.floats(0.01, 0.3),
        "phase": st.floats(0.01, 0.2),
        "last_decompressed": st.floats(0.01, 0.2),
        "last_compressed": st.floats(0.01, 0.2),
    },
    GraNet: {
        "schedule": schedules(),
        "fraction": st.floats(0.01, 0.99),
        "interval": st.none() | st.integers(1, 9),
        "seed": st.integers(0, 9),
    },
    TopKAST: {"widening": st.floats(1, 9), "interval": st.none() | st.integers(1, 9)},
    RigL: {
        "fraction": st.floats(0.01, 0.99),
        "interval": st.none() | st.integers(1, 9),
        "end": st.floats(0, 1),
        "seed": st.integers(0, 9),
    },
    DiSparse: {
        "dynamic": st.booleans(),
        "fraction": st.floats(0.01, 0.99),
        "interval": st.none() | st.integers(1, 9),
    },
}
kinds = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


def effective(value: Any) -> Any:
    """What decides what a run does, told setting by setting."""
    if not dataclasses.is_dataclass(value):
        return value
    told = {f.name: effective(getattr(value, f.name)) for f in dataclasses.fields(value)}
    without: set[str] = set()
    if isinstance(value, Magnitude | Taylor | GraNet):  # those times are of thresholds
        told["schedule"] = [
            setting for setting in told["schedule"] if setting[0] not in ("fix_at", "regrow_until")
        ]
    if isinstance(value, ST3 | Feather):  # pruned weights learn until the zeros are fixed
        told["schedule"] = [setting for setting in told["schedule"] if setting[0] != "regrow_until"]
    if isinstance(value, DiSparse) and not value.dynamic:
        without = {"fraction", "interval"}
    if isinstance(value, Adaptive):
        if value.gradient == "mask":  # pruned weights never receive a gradient
            told["schedule"] = [
                setting for setting in told["schedule"] if setting[0] != "regrow_until"
            ]
        for name, unbounded in (("min_density", 0.0), ("max_density", 1.0)):
            density = told[name]
            if isinstance(density, dict):
                density = {c: d for c, d in density.items() if d not in (None, unbounded)}
            told[name] = None if density in (unbounded, {}) else density
    rest = [(name, told[name]) for name in told if name not in without]
    return [("class", type(value)), *rest]


@kinds
@given(data=st.data())
def test_survives_json_and_equals_itself(kind: type, data: st.DataObject) -> None:
    method = data.draw(st.builds(kind, **METHODS[kind]))
    config = method.config()
    assert config["name"] == kind.__name__
    assert json.loads(json.dumps(config)) == config
    assert dataclasses.replace(method).config() == config


@kinds
@given(data=st.data())
def test_differs_when_a_setting_that_has_an_effect_does(kind: type, data: st.DataObject) -> None:
    method = data.draw(st.builds(kind, **METHODS[kind]))
    name = data.draw(st.sampled_from(list(METHODS[kind])))
    other = dataclasses.replace(method, **{name: data.draw(METHODS[kind][name])})
    alike = effective(other) == effective(method)
    assert (other.config() == method.config()) == alike


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Adaptive, "schedule"),
        (Adaptive, "allocation"),
        (Magnitude, "schedule"),
        (Taylor, "schedule"),
        (GraNet, "schedule"),
        (ST3, "schedule"),
        (Feather, "schedule"),
    ],
)
@given(data=st.data())
def test_differs_when_a_setting_of_a_setting_does(
    kind: type, part: str, data: st.DataObject
) -> None:
    method = data.draw(st.builds(kind, **METHODS[kind]))
    whole = getattr(method, part)
    assume(dataclasses.fields(whole))
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(whole)]))
    value = data.draw(
        st.sampled_from(["cubic", "linear", "cosine"])
        if name == "shape"
        else st.floats(0, 1) | st.just(getattr(whole, name))
    )
    try:
        changed = dataclasses.replace(whole, **{name: value})
    except ValueError:
        assume(False)
    other = dataclasses.replace(method, **{part: changed})
    assert (other.config() == method.config()) == (effective(other) == effective(method))


# --- methods of the user's ----------------------------------------------------------------------


@dataclass(frozen=True)
class Own(Method):
    """A method with a setting of any kind; it never makes a controller here."""

    setting: Any = None
    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        return Magnitude().controller(
            layers, model, target_sparsity=target_sparsity, total_steps=total_steps
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(JSON, JSON)
def test_any_setting_that_json_can_hold(one: Any, other: Any) -> None:
    config = Own(one).config()
    assert config["name"] == "Own"
    assert config["setting"] == one
    assert config["schedule"]["name"] == "SparsitySchedule"
    assert json.loads(json.dumps(config)) == config
    assert (Own(other).config() == config) == (other == one)


@pytest.mark.parametrize(
    "setting",
    [torch.ones(2), len, {1, 2}, [object()]],
    ids=["a tensor", "a function", "a set", "an object in a list"],
)
def test_settings_that_no_checkpoint_can_hold_are_refused(setting: Any) -> None:
    error, parts = TypeError, ("config()", "cannot store", "or override config()")
    raises(lambda: Own(setting).config(), error, *parts)
    assert_refused(Row("", call(method=Own(setting)), error, *parts))
