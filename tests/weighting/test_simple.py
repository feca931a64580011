"""Equal, fixed and callable weightings."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from refusals import Error, raises
from torch import Tensor

from torch_adapmtl import (
    CallableWeighting,
    EqualWeighting,
    FixedWeighting,
)


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


@pytest.mark.parametrize(
    ("weights", "error", "named", "found", "remedy"),
    [
        ({"b": 1.0}, ValueError, "weights", "missing ['a'], unknown ['b']", "exactly the tasks"),
        ({"a": -1.0}, ValueError, "weights['a']", "got -1.0", "finite and not negative"),
        ({"a": math.inf}, ValueError, "weights['a']", "got inf", "finite and not negative"),
        ({"a": 0.0}, ValueError, "weights", "all 0", "at least one task a positive weight"),
        ({"a": "1"}, TypeError, "weights['a']", "'1'", "be a number"),
        ([1.0], TypeError, "weights", "got [1.0]", "a mapping"),
    ],
    ids=str,
)
def test_refused_fixed(weights: Any, error: Error, named: str, found: str, remedy: str) -> None:
    raises(lambda: FixedWeighting(["a"], weights), error, named, found, remedy)


@pytest.mark.parametrize(
    ("weights", "error", "named", "found", "remedy"),
    [
        ({"a": 1.0}, ValueError, "returned by fn", "missing ['b']", "exactly the tasks"),
        (
            {"a": 1.0, "b": 1.0, "z": 1.0},
            ValueError,
            "returned by fn",
            "unknown ['z']",
            "exactly the tasks",
        ),
        ({"a": 1.0, "b": math.nan}, ValueError, "'b' returned by fn", "got nan", "finite"),
        ({"a": -1.0, "b": 1.0}, ValueError, "'a' returned by fn", "got -1", "not negative"),
        ({"a": "x", "b": 1.0}, TypeError, "'a' returned by fn", "'x'", "be a number"),
        ({"a": torch.ones(2), "b": 1.0}, ValueError, "'a' returned by fn", "(2,)", "a scalar"),
        ([1.0, 1.0], TypeError, "returned by fn", "[1.0, 1.0]", "a mapping"),
    ],
    ids=str,
)
def test_refused_callable(weights: Any, error: Error, named: str, found: str, remedy: str) -> None:
    weighting = CallableWeighting(["a", "b"], lambda losses: weights)
    ones = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    raises(lambda: weighting(ones), error, named, found, remedy)


def test_what_cannot_be_called_is_refused() -> None:
    fn: Any = 3
    raises(lambda: CallableWeighting(["a"], fn), TypeError, "fn", "got int", "callable")


@given(
    numbers=st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any),
    others=st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any),
    factor=st.integers(1, 9),
)
def test_configs_are_equal_where_the_ratios_are(
    numbers: list[int], others: list[int], factor: int
) -> None:
    def config(weights: list[int]) -> Any:
        tasks = [f"t{i}" for i in range(len(numbers))]
        made = FixedWeighting(tasks, dict(zip(tasks, weights, strict=True))).config()
        assert json.loads(json.dumps(made)) == made
        return made

    assert config([factor * number for number in numbers]) == config(numbers)
    others = (others * 2)[: len(numbers)]
    assume(any(others))
    alike = all(
        n * p == m * o
        for n, o in zip(numbers, others, strict=True)
        for m, p in zip(numbers, others, strict=True)
    )
    assert (config(others) == config(numbers)) == alike


def test_equal_weights_are_fixed_ones() -> None:
    assert (
        EqualWeighting(["a", "b"]).config()
        == FixedWeighting(["a", "b"], {"a": 3, "b": 3.0}).config()
    )


def test_the_config_of_a_callable_says_whether_it_is_scaled() -> None:
    configs = [
        CallableWeighting(["a"], lambda losses: losses, normalize=normalize).config()
        for normalize in (True, False)
    ]
    assert configs[0] != configs[1]
    assert json.loads(json.dumps(configs)) == configs


@pytest.mark.parametrize("normalize", [True, False])
def test_a_loss_of_0_does_not_reach_the_other_weights(normalize: bool) -> None:
    """A batch without labels: the weight that 1 / 0 makes is not used."""

    def inverse(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {task: 1 / loss for task, loss in losses.items()}

    found = []
    for missing in (None, torch.tensor(0.0)):
        weighting = CallableWeighting(["a", "b", "c"], inverse, normalize=normalize)
        weighting({"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor(4.0)})
        total = weighting({"a": torch.tensor(2.0), "b": missing, "c": torch.tensor(6.0)})
        found.append((total.item(), weighting.as_dict()))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(6.0 if normalize else 2.0)
