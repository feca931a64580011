"""How a model's output splits into tasks."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import Pair, Record, Returns, TypedPair, linear
from finding import X, by_name, detected
from torch import Tensor, nn
from untouched import assert_untouched

from torch_adapmtl import find_components
from torch_adapmtl._checks import outputs_named_like

LEFT_RIGHT = {
    "body.0.weight": "shared",
    "body.2.weight": "shared",
    "heads.a.weight": "left",
    "heads.b.weight": "right",
}


NAMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda a, b: {"left": a, "right": b},
    "ordered": lambda a, b: OrderedDict(left=a, right=b),
    "namedtuple": lambda a, b: Pair(a, b),
    "typed": lambda a, b: TypedPair(a, b),
    "dataclass": lambda a, b: Record(a, b),
    "nested": lambda a, b: {"left": {"x": [a, None], "y": 3}, "right": (b, "text")},
    "no tensors": lambda a, b: {"left": a, "none": None, "right": b, "epoch": 3, "names": ["x"]},
    "loss": lambda a, b: {"loss": a.sum() + b.sum(), "left": a, "right": b},
    "distribution": lambda a, b: {"left": torch.distributions.Normal(a, 1.0), "right": b},
    "partly without grad": lambda a, b: {"left": (a.argmax(1), a), "right": b},
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED.keys())
def test_named_outputs(make: Callable[[Tensor, Tensor], Any]) -> None:
    components = find_components(Returns(make), X)
    assert components.tasks == ("left", "right")
    assert by_name(components) == LEFT_RIGHT


@pytest.mark.parametrize("make", [lambda a, b: (a, b), lambda a, b: [a, b]], ids=["tuple", "list"])
def test_positional_outputs(make: Callable[[Tensor, Tensor], Any]) -> None:
    assert find_components(Returns(make), X).tasks == ("0", "1")
    components = find_components(Returns(make), X, task_outputs=["left", "right"])
    assert components.tasks == ("left", "right")
    assert by_name(components) == LEFT_RIGHT


SPLITS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "callables": (
        lambda a, b: [[a], [b]],
        {"left": lambda o: o[0][0], "right": lambda o: o[1]},
    ),
    "keys": (lambda a, b: {"l": a, "r": b, "x": a}, {"left": "l", "right": "r"}),
    "indices": (lambda a, b: (a, b, a.argmax()), {"left": 0, "right": 1}),
    "attributes": (lambda a, b: Pair(a, b), {"left": "left", "right": "right"}),
    "any object": (
        lambda a, b: types.SimpleNamespace(p=a, q=b),
        {"left": "p", "right": lambda o: o.q},
    ),
    "some keys": (lambda a, b: {"x": a + 1, "right": b, "left": a}, ["left", "right"]),
    "renamed fields": (lambda a, b: TypedPair(a, b), ["left", "right"]),
}


@pytest.mark.parametrize(("make", "task_outputs"), SPLITS.values(), ids=SPLITS.keys())
def test_task_outputs(make: Callable[[Tensor, Tensor], Any], task_outputs: Any) -> None:
    components = find_components(Returns(make), X, task_outputs=task_outputs)
    assert components.tasks == ("left", "right")
    assert by_name(components) == LEFT_RIGHT


def test_what_is_joined_and_sliced_again_is_shared() -> None:
    model = Returns(lambda a, b: torch.cat([a, b], 1))
    tasks = {"left": lambda out: out[:, :2], "right": lambda out: out[:, 2:]}
    assert find_components(model, X, task_outputs=tasks).names == ("shared",)


def test_one_task_as_the_user_says() -> None:
    model = nn.Sequential(linear(), linear())
    components = find_components(model, X, task_outputs={"main": lambda output: output})
    assert components.names == components.tasks == ("main",)


def test_model_output_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.utils import ModelOutput

    def make(a: Tensor, b: Tensor) -> Any:
        return ModelOutput(loss=a.sum() + b.sum(), left=a, right=b, hidden_states=None)

    assert detected(Returns(make)) == LEFT_RIGHT


ERRORS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, str]] = {
    "one tensor": (lambda a, b: a, None, r"returns one tensor.*task_outputs=.*groups=\{\"main\""),
    "an object": (lambda a, b: types.SimpleNamespace(a=a), None, "returns a SimpleNamespace"),
    "one entry": (lambda a, b: {"out": a, "aux": None}, None, r"one output \('out'\) only"),
    "no entry": (lambda a, b: {}, None, "returns no tensor, so it is not multi-task"),
    "argmax": (lambda a, b: {"x": a, "y": b.argmax(1)}, None, r"'y' has no gradient .*int64"),
    "detached": (lambda a, b: {"x": a, "y": b.detach()}, None, r"'y' has no gradient .*float32"),
    "reserved": (lambda a, b: {"shared": a, "y": b}, None, "'shared' cannot be a task name"),
    "unused": (lambda a, b: {"unused": a, "y": b}, None, "'unused' cannot be a task name"),
    "plus": (lambda a, b: {"x+y": a, "y": b}, None, r"'x\+y' cannot be a task name"),
    "dot": (lambda a, b: {"x.y": a, "y": b}, None, r"'x\.y' cannot be a task name"),
    "empty": (lambda a, b: {"": a, "y": b}, None, "'' cannot be a task name"),
    "integer": (lambda a, b: {0: a, 1: b}, None, "must be a string, found 0"),
    "function": (
        lambda a, b: {"x": a},
        {"y": lambda out: out["typo"]},
        r"function of task 'y' failed on the model's output \(a dict\): KeyError: 'typo'",
    ),
    "no tensor": (lambda a, b: (a, None), ["x", "y"], "task 'y' holds no tensor"),
    "too few": (lambda a, b: (a, b), ["x"], "names 1 tasks, but the model returns 2"),
    "wrong keys": (lambda a, b: {"p": a, "q": b}, ["x", "y"], r"returns keys \['p', 'q'\]"),
    "unsplit": (lambda a, b: a, ["x", "y"], "but the model returns one tensor"),
    "missing key": (lambda a, b: {"p": a}, {"x": "p", "y": "q"}, "task 'y' .* at 'q'"),
    "missing index": (lambda a, b: (a,), {"x": 0, "y": 4}, "task 'y' .* at 4"),
    "frozen name": (lambda a, b: (a, b), ["x", "frozen"], "'frozen' cannot be a task name"),
    "twice": (lambda a, b: (a, b), ["x", "x"], "names 'x' twice"),
    "none": (lambda a, b: (a, b), [], "task_outputs is empty"),
}


def nested(a: Tensor, b: Tensor) -> dict[str, Any]:
    return {"left": a, "right": b, "epoch": 3}


RENAMED = r'task_outputs=\{"left": "left_logits", "right": "out.RIGHT"\}$'
NESTED = (
    r"whose entry '0' is a dict of 'left', 'right'. If these are the tasks, .*task_outputs=\{"
    r'"left": lambda output: output\[0\]\["left"\], "right": lambda output: '
    r'output\[0\]\["right"\]\}'
)
ERRORS |= {
    "keys of similar names": (
        lambda a, b: {"left_logits": a, "out.RIGHT": b, "upright": a},
        ["left", "right"],
        RENAMED,
    ),
    "keys of which none is similar": (
        lambda a, b: {"left_logits": a, "left_hidden": a, "right": b},
        ["left", "right"],
        r'task_outputs=\{"name": lambda output: ..., ...\}$',
    ),
    "a key of a similar name": (
        lambda a, b: {"left_logits": a, "right": b},
        {"left": "left", "right": "right"},
        r"nothing there; there is 'left_logits', 'right'; .* as in task_outputs=\{\"left\": ",
    ),
    "tasks and features": (
        lambda a, b: (nested(a, b), a),
        None,
        NESTED + r'; if the entries of the whole are the tasks, name them: task_outputs=\["',
    ),
    "a loss and tasks": (
        lambda a, b: [a.sum(), Pair(a, b)],
        None,
        r"a list whose entry '1' is a Pair of .* output\[1\]\.left, ",
    ),
    "tasks and None": (lambda a, b: (nested(a, b), None), None, NESTED + "$"),
    "tasks in a dict": (
        lambda a, b: {"out": Record(a, b)},
        None,
        r"a dict whose entry 'out' is a Record of .* output\[\"out\"\]\.left, ",
    ),
}


def test_similar_names_in_groups() -> None:
    model = Returns(lambda a, b: {"left_logits": a, "right_logits": b, "x": a * 2})
    with pytest.raises(ValueError, match=r"'left' is not a task; .* pass task_out") as caught:
        find_components(model, X, groups={"left+x": ["body"]})
    assert str(caught.value).endswith(
        '{"left": "left_logits", "right_logits": "right_logits", "x": "x"}'
    )


def test_entries_that_may_be_nested_tasks() -> None:
    """Several nested entries are tasks, and so are those that have names."""
    for make, tasks in (
        (lambda a, b: (nested(a, b), {"x": a, "y": b}), ("0", "1")),
        (lambda a, b: ({"x": a}, b), ("0", "1")),
        (lambda a, b: ([a, b], b), ("0", "1")),
        (lambda a, b: {"boxes": nested(a, b), "mask": b}, ("boxes", "mask")),
        (lambda a, b: Pair(nested(a, b), b), ("left", "right")),
    ):
        assert find_components(Returns(make), X).tasks == tasks
    model = Returns(lambda a, b: (nested(a, b), a))
    assert find_components(model, X, task_outputs=["both", "a"]).tasks == ("both", "a")


@pytest.mark.parametrize(("make", "task_outputs", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_output_errors(
    make: Callable[[Tensor, Tensor], Any], task_outputs: Any, match: str
) -> None:
    model = Returns(make)

    def run() -> None:
        with pytest.raises(ValueError, match=match):
            find_components(model, X, task_outputs=task_outputs)

    assert_untouched(model, run)


@pytest.mark.parametrize(
    ("names", "outputs", "rest", "argument"),
    [
        (["ner"], ["ner_logits", "pos"], True, '{"ner": "ner_logits", "pos": "pos"}'),
        (["ner", "pos"], ["pos-out", "x", "NER"], False, '{"ner": "NER", "pos": "pos-out"}'),
        (["seg"], ["segment", "depth"], True, None),
        (["seg"], ["seg_a", "seg_b"], True, None),
        (["seg", 3], ["seg_a", "seg_b"], True, None),
        (["seg"], ["seg", "depth"], True, None),
    ],
)
def test_names_that_are_nearly_those_of_outputs(
    names: list[Any], outputs: list[str], rest: bool, argument: str | None
) -> None:
    expected = f"task_outputs={argument}" if argument else ""
    assert outputs_named_like(names, outputs, rest=rest) == expected
