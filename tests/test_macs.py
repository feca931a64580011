"""A budget of multiply-adds: met, kept, saved and reported as one of weights is."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Row, assert_refused, call, option, rows, running
from torch import Tensor, nn
from toys import Bag, TwoTasks, initialise, losses, prepare, tensors, train

from torch_adapmtl import (
    ACDC,
    SNIP,
    ST3,
    STR,
    Adaptive,
    DiSparse,
    Feather,
    GraNet,
    IterativeMagnitude,
    Magnitude,
    MaskController,
    Method,
    Paper,
    Pruner,
    RigL,
    SparsitySchedule,
    Taylor,
    TopKAST,
    apply_adapmtl,
)
from torch_adapmtl.layers import sampling

pytestmark = pytest.mark.filterwarnings(
    "ignore:no weight is left",  # of few, used everywhere
    "ignore:the thresholds of STR",  # trained for 20 steps
)

POSITIONS = {"body": 50, "heads.a": 7, "heads.b": 2.5}


class Maps(nn.Module):
    """Maps that shrink: early weights are few, and used at many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh()
        )
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Conv2d(8, 3, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x[:, None, :, None] * x[:, None, None, :])
        return {"a": self.heads["a"](h.mean((2, 3))), "b": self.heads["b"](h).mean((2, 3))}


def share(pruner: Pruner) -> tuple[float, float]:
    """The share of the multiply-adds that the zeros save, and that of one weight; by hand."""
    positions = pruner._config["count"]["positions"]
    saved = total = 0.0
    for tensor in (t for name in pruner.components.names for t in pruner.components[name]):
        module, attribute = tensor.owners[0]
        weight = getattr(module, attribute)
        saved += positions[tensor.name] * int((weight == 0).sum())
        total += positions[tensor.name] * weight.numel()
    return saved / total, max(positions.values()) / total


def assert_met(pruner: Pruner, target: float) -> None:
    saved, weight = share(pruner)
    assert abs(saved - target) < weight


class Own(MaskController):
    def scores(self) -> list[Tensor]:
        return [-layer.weight.abs() for layer in self.layers]


class LargestFirst(Method):
    def config(self) -> dict[str, Any]:
        return {"name": "LargestFirst"}

    def controller(self, layers: Any, model: nn.Module, **aim: Any) -> Own:
        return Own(layers, aim["target_sparsity"], aim["total_steps"], SparsitySchedule())


METHODS: dict[str, Method] = {
    "adaptive": Adaptive(),
    "common": Adaptive(allocation="common"),
    "by component": Adaptive(granularity="component"),
    "sensitivity": Adaptive(allocation="sensitivity"),
    "gradient": Adaptive(allocation="gradient"),
    "global": Magnitude(),
    "uniform": Magnitude("uniform"),
    "Taylor": Taylor(),
    "SNIP": SNIP(),
    "DiSparse dynamic": DiSparse(dynamic=True),
    "AC/DC": ACDC(),
    "GraNet": GraNet(),
    "Top-KAST": TopKAST(),
    "RigL": RigL(),
    "IMP": IterativeMagnitude(rounds=3),
    "LTH": IterativeMagnitude(rounds=3, rewind=True),
    "ST-3": ST3(),
    "Feather": Feather(),
    "STR": STR(start=-1.2),
    "own": LargestFirst(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@methods
@pytest.mark.parametrize("how", ["usual", "constant", "coarse", "two scales"])
@pytest.mark.parametrize("target", [0.3, 0.9])
def test_the_target_is_met_to_less_than_a_weight(method: Method, how: str, target: float) -> None:
    model = Maps()
    keys = list(model.state_dict())
    initialise(model, how)
    pruner = prepare(model, target_sparsity=target, total_steps=20, method=method, count="macs")
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2, weight_decay=1e-2))
    train(model, pruner, optimizer, range(20))
    assert_met(pruner, target)
    sum(losses(model, 99).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    pruner.finalize()
    assert_met(pruner, target)
    assert list(model.state_dict()) == keys


@settings(max_examples=30)
@given(
    shapes=st.lists(
        st.sampled_from([(1, 1), (7, 5), (3, 2, 3), (20, 15), (4, 3, 3, 3)]), min_size=2, max_size=5
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    how=st.sampled_from(["usual", "constant", "coarse", "two scales"]),
    target=st.floats(0, 0.99),
    least=st.sampled_from([None, 0.01, {"a": 0.2}]),
    most=st.sampled_from([None, {"b": 0.6}]),
    positions=st.lists(st.sampled_from([0.5, 1, 3, 49, 1024, 12544]), min_size=5, max_size=5),
    small=st.booleans(),
)
def test_the_target_is_met_whatever_the_weights_are(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, how: str, target: float, least: Any,
    most: Any, positions: list[float], small: bool,
) -> None:  # fmt: skip
    model = Bag(shapes, dtype)
    initialise(model, how)
    names = [f"layers.{i}" for i in range(len(shapes))]
    groups, refusal = {"a": names[::2], "b": names[1::2]}, ""
    with pytest.MonkeyPatch.context() as patch:
        if small:  # samples of a few weights
            for name, value in (("SAMPLE", 60), ("LAYER_SAMPLE", 10), ("LARGE", 4), ("PIECE", 16)):
                patch.setattr(sampling, name, value)
        try:
            pruner = apply_adapmtl(
                model, target_sparsity=target, total_steps=6, groups=groups,
                method=Adaptive(min_density=least, max_density=most),
                count=dict(zip(names, positions, strict=False)),
            )  # fmt: skip
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert "multiply-adds" in refusal
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(6):
            pruner.loss(model.losses(groups)).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
    assert_met(pruner, target)
    report = pruner.report()
    weight = max(pruner.layers.costs)
    for row in report.components:
        assert row.macs is not None
        assert row.macs_left is not None
        if least is not None:
            floor = (least if isinstance(least, float) else least.get(row.name, 0.0)) * row.macs
            assert row.macs_left >= floor - weight
        if most is not None and row.name == "b":
            assert row.macs_left <= 0.6 * row.macs + weight


@pytest.mark.parametrize("method", [Adaptive(), Adaptive(allocation="common"), Magnitude(), ST3()])
def test_the_share_follows_the_schedule(method: Any) -> None:
    schedule = SparsitySchedule(start=0.1, end=0.8)
    model = Maps()
    method = type(method)(**{**vars(method), "schedule": schedule})
    pruner = prepare(model, total_steps=30, method=method, count="macs")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, 30):
        train(model, pruner, optimizer, [step])
        saved, weight = share(pruner)
        # A threshold can be off by a rounding, in each of the four layers.
        assert abs(saved - schedule(step, 30, 0.8)) <= 4 * weight


@pytest.mark.parametrize("positions", [1, 64])
@pytest.mark.parametrize("method", [Adaptive(), Magnitude(), Taylor(), ST3()])
def test_equal_positions_are_a_budget_of_weights(method: Method, positions: float) -> None:
    found = []
    for count in ("weights", {"*": positions}):
        torch.manual_seed(0)
        model = TwoTasks()
        # 0.75 of 168 weights are 126, so that nothing is rounded at the end.
        pruner = prepare(model, count=count, method=method, target_sparsity=0.75)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        train(model, pruner, optimizer, range(20))
        found.append(tensors(pruner.finalize()))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_thresholds_grow_with_a_power_of_the_positions(power: float) -> None:
    options: Any = {"allocation": "common", "position_power": power}
    # So low that no layer is at the least that it keeps.
    pruner = prepare(TwoTasks(40), count=POSITIONS, target_sparsity=0.1, **options)
    for _ in range(12):
        pruner.step()
    alphas = pruner.controller.thresholds()
    expected = torch.tensor([50, 7, 2.5]) ** power
    torch.testing.assert_close(alphas / alphas[0], expected / expected[0])


# --- what is known of the model -----------------------------------------------------------------


def test_positions_are_measured_given_or_both() -> None:
    def found(**options: Any) -> dict[str, float]:
        config: dict[str, float] = prepare(Maps(), **options)._config["count"]["positions"]
        return config

    measured = {
        "body.0.weight": 16, "body.2.weight": 1, "heads.a.weight": 1, "heads.b.weight": 1,
    }  # fmt: skip
    assert found(count="macs") == measured
    given = found(count={"heads": 3, "heads.b.weight": 0.5})
    assert given == {**measured, "heads.a.weight": 3, "heads.b.weight": 0.5}
    groups = {"a": ["*"]}
    model = Bag([(3, 4), (5, 6)], torch.float32)
    options: Any = {"target_sparsity": 0.5, "total_steps": 9, "groups": groups}
    pruner = apply_adapmtl(model, count={model.layers[0]: 2, "layers.1.*": 3}, **options)
    assert pruner.layers.costs == [2, 3]


class ByHand(TwoTasks):
    """A product that no table knows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.cdist(x[None], self.body.weight[None])[0]
        return {task: head(h) for task, head in self.heads.items()}


TABLE = [
    option("another count", ValueError, "count", "'flops'", "'weights', 'macs'", count="flops"),
    option("no positions", ValueError, "count", "'body'", "> 0, got 0", count={"body": 0}),
    option("a word", TypeError, "count", "'many'", "must be a number", count={"body": "many"}),
    option("an unknown layer", ValueError, "count", "'neck'", "named_modules",
           count={"neck": 4}),
    option("a layer without weights", ValueError, "count", "'body.bias'", "name one of",
           count={"body.bias": 4}),
    option("a power without positions", ValueError, "position_power=0.5", "weights",
           "count='macs', or leave it out", position_power=0.5),
    Row("a product that is not known", call(count="macs"), ValueError, "count='macs'",
        "'body.weight'", "count={'body.weight': 64}", model=ByHand, goes_on=False),
    Row("nothing that has run", call(count="macs", groups={"a": ["*"]}, example_inputs=None),
        ValueError, "count='macs'", "'body.weight'", "example_inputs="),
    option("floors above what is left", ValueError, "min_density", "saved multiply-adds",
           "Change the target", count=POSITIONS, min_density=0.5),
    running("a higher target, without a schedule",
            lambda scene: scene.pruner.retarget(0.9, total_steps=5), RuntimeError, "retarget()",
            "method='adaptive'", "finalize()", options={"count": POSITIONS, "method": SNIP()},
            goes_on=False),
]  # fmt: skip


@rows(TABLE)
def test_refused(row: Row) -> None:
    assert_refused(row)


def test_powers_are_checked() -> None:
    with pytest.raises(ValueError, match=r"position_power must lie in \[0, 1\], got 1.5"):
        Adaptive(position_power=1.5)
    with pytest.raises(TypeError, match=r"position_power must be a number"):
        Adaptive(position_power="much")  # type: ignore[arg-type]


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 12, 19])
@pytest.mark.parametrize("method", [Adaptive(), Magnitude("uniform")])
def test_a_run_is_resumed_bit_for_bit(method: Method, stop: int) -> None:
    def start() -> tuple[nn.Module, Pruner, torch.optim.Optimizer]:
        model = Maps()
        pruner = prepare(model, method=method, count="macs")
        return model, pruner, torch.optim.SGD(model.parameters(), lr=0.1)

    model, pruner, optimizer = start()
    train(model, pruner, optimizer, range(stop))
    state = copy.deepcopy(model.state_dict())
    train(model, pruner, optimizer, range(stop, 20))
    other, again, second = start()
    other.load_state_dict(state)
    train(other, again, second, range(stop, 20))
    assert_met(again, 0.8)
    assert all(torch.equal(value, tensors(other)[key]) for key, value in tensors(model).items())


@pytest.mark.parametrize(
    ("saved", "own", "text"),
    [
        ("weights", "macs", "count.of='weights'.*count.of='macs'.*prepare it alike"),
        ("macs", "weights", "count.of='macs'.*count.of='weights'.*prepare it alike"),
        ("macs", {"body.2": 9}, "positions.body.2.weight=1.0.*=9.0.*prepare it alike"),
    ],
)
def test_the_state_of_a_run_that_counts_otherwise_is_refused(
    saved: Any, own: Any, text: str
) -> None:
    model, other = Maps(), Maps()
    prepare(model, count=saved)
    pruner = prepare(other, count=own)
    before = tensors(other)
    with pytest.raises(ValueError, match=text):
        other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in tensors(other).items())
    assert pruner.step_count == 0


@pytest.mark.parametrize("stop", [0, 7, 20])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 0.95])
def test_another_target_is_met(target: float, stop: int) -> None:
    model = TwoTasks()
    pruner = prepare(model, count=POSITIONS)
    optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-2))
    train(model, pruner, optimizer, range(stop))
    before, weight = share(pruner)
    masks = [layer.sparse() == 0 for layer in pruner.layers]
    pruner.retarget(target, total_steps=15)
    low, high = sorted((before, target))
    for step in range(15):
        train(model, pruner, optimizer, [step])
        assert low - 4 * weight <= share(pruner)[0] <= high + 4 * weight
    assert_met(pruner, target)
    if stop == 20 and target >= 0.8:
        assert all(
            bool((layer.sparse() == 0)[mask].all())
            for layer, mask in zip(pruner.layers, masks, strict=True)
        )
    pruner.finalize()
    assert_met(pruner, target)


@pytest.mark.parametrize("method", [Adaptive(), Magnitude(), Magnitude("uniform")])
def test_a_finished_model_is_a_start_to_the_same_target(method: Method) -> None:
    """Its zeros, all kept, can exceed the budget by a part of a weight."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = TwoTasks()
        for _ in range(2):
            pruner = prepare(model, count=POSITIONS, method=method)
            masks = [layer.initial_mask for layer in pruner.layers]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, pruner, optimizer, range(20))
            pruner.finalize()
            assert_met(pruner, 0.8)
        assert any(mask is not None for mask in masks)
        for layer, mask in zip(pruner.layers, masks, strict=True):
            assert mask is None or bool((layer.weight[~mask] == 0).all())


def test_the_papers_thresholds_stop_at_the_share() -> None:
    model = TwoTasks(40)
    method = Paper(start=-4.0, weight_decay=1.0)
    pruner = prepare(model, target_sparsity=0.3, total_steps=60, count=POSITIONS, method=method)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.05))
    while not pruner.controller.reached:
        before = share(pruner)[0]
        assert before < 0.3
        train(model, pruner, optimizer, [pruner.step_count])
    assert share(pruner)[0] >= 0.3


# --- reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["weights", "macs"])
def test_reports_say_what_is_left(count: Any) -> None:
    model = Maps()
    pruner = prepare(model, count=count)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(20))
    report = pruner.report()
    positions = {"body.0.weight": 16, "body.2.weight": 1, "heads.a.weight": 1, "heads.b.weight": 1}
    left = {
        row.name: positions[row.name] * int((model.get_parameter(row.name) != 0).sum())
        for row in report.layers
    }
    assert {row.name: row.macs_left for row in report.layers} == left
    assert report.macs == 16 * 54 + 6 * 8 * 9 + 8 * 5 + 8 * 3
    assert report.macs_left == sum(left.values())
    by_component = {row.name: row.macs_left for row in report.components}
    assert by_component == {
        "shared": left["body.0.weight"] + left["body.2.weight"],
        "a": left["heads.a.weight"],
        "b": left["heads.b.weight"],
    }
    saved = 1 - report.macs_left / report.macs
    assert report.pruned == pytest.approx(saved if count == "macs" else report.sparsity)
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["macs"], found["macs_left"], found["count"]) == (
        report.macs, report.macs_left, count,
    )  # fmt: skip
    for text in (str(report), report._repr_html_()):
        assert "MACs left" in text
        assert f"{100 - 100 * saved:.2f} %" in text
        assert ("of the multiply-adds" in text) == (count == "macs")


def test_reports_of_what_is_not_known_say_nothing() -> None:
    model = Bag([(3, 4), (5, 6)], torch.float32)
    options: Any = {"target_sparsity": 0.5, "total_steps": 9, "groups": {"a": ["*"]}}
    report = apply_adapmtl(model, **options).report()
    assert report.macs is None
    assert report.macs_left is None
    assert "MAC" not in str(report)


def test_errors_of_the_end_count_multiply_adds() -> None:
    model = Maps()
    pruner = prepare(model, count="macs")
    with pytest.raises(RuntimeError, match=r"0\.00% of the multiply-adds are pruned now, and 80"):
        pruner.finalize()
    pruner.fix_zeros()
    layer = pruner.layers[0]
    layer.threshold.mask = torch.ones_like(layer.weight, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"found [\d.]+ saved multiply-adds in place of the"):
        pruner.finalize()
