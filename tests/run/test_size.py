"""Delta_T against the published figures; sparsity and size against plain counts."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_adapmtl import relative_performance, size, sparsity

TABLE = Path(__file__).parents[1] / "fixtures" / "nyuv2_mobilenetv2.csv"
METRICS = {
    "seg": ["miou", "pixel_acc"],
    "normal": ["angle_mean", "angle_median", "within_11_25", "within_22_5", "within_30"],
    "depth": ["abs_err", "rel_err", "delta_1_25", "delta_1_25_2", "delta_1_25_3"],
}
LOWER = ["angle_mean", "angle_median", "abs_err", "rel_err"]


def published() -> dict[str, dict[str, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return {row["model"]: row for row in csv.DictReader(lines)}


def metrics_of(row: dict[str, str]) -> dict[str, dict[str, float]]:
    return {task: {name: float(row[name]) for name in names} for task, names in METRICS.items()}


# --- relative performance -----------------------------------------------------------------------


@pytest.mark.parametrize("model", list(published()))
def test_published_deltas_to_two_decimals(model: str) -> None:
    rows = published()
    found = relative_performance(
        metrics_of(rows[model]), metrics_of(rows["dense"]), lower_is_better=LOWER
    )
    assert found.delta == pytest.approx(float(rows[model]["delta_T"]), abs=0.00501)
    for task, delta in found.tasks.items():
        assert delta == pytest.approx(float(rows[model][f"delta_{task}"]), abs=0.00501)
        assert delta == pytest.approx(sum(found.metrics[task].values()))


def test_published_table_is_whole() -> None:
    assert len(published()) == 7


def test_equal_names_in_two_tasks_can_be_told_apart() -> None:
    found = relative_performance(
        {"a": {"error": 2.0}, "b": {"error": 2.0}},
        {"a": {"error": 1.0}, "b": {"error": 1.0}},
        lower_is_better=[("a", "error")],
    )
    assert found.tasks == {"a": -100, "b": 100}
    assert found.delta == 0
    assert str(found).splitlines()[-1] == "overall     +0.00 %"


def test_more_of_a_negative_baseline_is_better() -> None:
    found = relative_performance(
        {"a": {"loglik": -1.0}}, {"a": {"loglik": -2.0}}, lower_is_better=()
    )
    assert found.delta == 50


values = st.floats(0.01, 100)


@given(st.lists(st.tuples(values, values, st.booleans()), min_size=1, max_size=6), values)
def test_relative_performance_has_no_unit(
    rows: list[tuple[float, float, bool]], scale: float
) -> None:
    lower = [(f"t{i}", "m") for i, row in enumerate(rows) if row[2]]

    def delta(factor: float) -> float:
        return relative_performance(
            {f"t{i}": {"m": row[0] * factor} for i, row in enumerate(rows)},
            {f"t{i}": {"m": row[1] * factor} for i, row in enumerate(rows)},
            lower_is_better=lower,
        ).delta

    assert delta(scale) == pytest.approx(delta(1.0), rel=1e-6, abs=1e-6)
    plain = [(-1 if low else 1) * (m / b - 1) * 100 for m, b, low in rows]
    assert delta(1.0) == pytest.approx(sum(plain) / len(plain), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("metrics", "baseline", "lower", "error", "match"),
    [
        ({"a": {"m": 1.0}}, {"a": {"m": 0.0}}, (), ValueError, r"baseline\['a'\]\['m'\] is 0"),
        ({"a": {"m": math.nan}}, {"a": {"m": 1.0}}, (), ValueError, r"metrics\['a'\]\['m'\].*nan"),
        ({"a": {"m": 1.0}}, {"a": {"m": math.inf}}, (), ValueError, r"baseline\['a'\].*inf"),
        ({"a": {"m": "x"}}, {"a": {"m": 1.0}}, (), TypeError, "must be a number, got 'x'"),
        (
            {"a": {"m": 1.0}},
            {"a": {"n": 1.0}},
            (),
            ValueError,
            r"task 'a' differ.*\['n'\].*\['m'\]",
        ),
        ({"a": {"m": 1.0}}, {}, (), ValueError, r"tasks differ.*baseline lacks \['a'\]"),
        ({}, {}, (), ValueError, "no tasks"),
        ({"a": {}}, {"a": {}}, (), ValueError, "no metrics of task 'a'"),
        ({"a": 1.0}, {"a": 1.0}, (), TypeError, "metrics must be a mapping.*1.0"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, "m", TypeError, r"pass \['m'\]"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, ["n"], ValueError, r"\['n'\], which no task has"),
        ({"a": {"m": 1.0}}, {"a": {"m": 1.0}}, [("b", "m")], ValueError, r"which no task has"),
    ],
)
def test_relative_performance_refuses(
    metrics: Any, baseline: Any, lower: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        relative_performance(metrics, baseline, lower_is_better=lower)


def test_values_may_be_tensors() -> None:
    found = relative_performance(
        {"a": {"m": torch.tensor(1.5)}}, {"a": {"m": torch.tensor(1.0)}}, lower_is_better=()
    )
    assert found.delta == 50


# --- sparsity and size ------------------------------------------------------------------------


class Halve(nn.Module):
    """Zeroes the first half of a tensor's elements."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.numel()).reshape(x.shape) >= x.numel() // 2
        return x * keep


def test_sparsity_of_tensors() -> None:
    x = torch.tensor([0.0, -0.0, math.nan, 1e-30])
    assert sparsity(x) == 0.5
    assert sparsity([x, torch.zeros(2, 2)]) == 0.75
    assert sparsity([x, x]) == 0.5
    assert sparsity(t for t in [torch.zeros(1), torch.ones(3)]) == 0.25


def test_sparsity_of_a_model_counts_prunable_weights_only() -> None:
    model = nn.ModuleList(
        [
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ConvTranspose1d(2, 2, 2),
            nn.Embedding(5, 2),
            nn.LSTM(2, 2),
            nn.MultiheadAttention(4, 2),
            nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
        ]
    )
    prunable = [
        model[0].weight,
        model[2].weight,
        model[5].in_proj_weight,
        model[5].out_proj.weight,
        model[6].q_proj_weight,
        model[6].k_proj_weight,
        model[6].v_proj_weight,
        model[6].out_proj.weight,
    ]
    ids = {id(weight) for weight in prunable}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in ids:
                parameter.zero_()
        assert sparsity(model) == 0
        prunable[3].zero_()
    assert sparsity(model) == prunable[3].numel() / sum(w.numel() for w in prunable)


def test_tied_weights_count_once_whoever_comes_first() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    assert sparsity(model) == 0.5
    assert size(model).parameters == 12 + 4 + 12 + 4


def test_weights_count_as_the_forward_pass_uses_them() -> None:
    layer = nn.Linear(4, 4, bias=False)
    prune.random_unstructured(layer, "weight", amount=4)
    assert sparsity(layer) == 0.25
    with torch.no_grad():
        layer.weight_orig.fill_(0)  # without a forward: the plain attribute is stale
    assert sparsity(layer) == 1

    layer = nn.Linear(4, 4, bias=False)
    parametrize.register_parametrization(layer, "weight", Halve())
    assert sparsity(layer) == 0.5
    assert size(layer).zeros == 8
    assert size(layer).parameters == 16

    layer = nn.Linear(4, 4, bias=False)
    prune.custom_from_mask(layer, "weight", torch.arange(16).reshape(4, 4) < 12)
    parametrize.register_parametrization(layer, "weight_orig", Halve())
    assert sparsity(layer) == 0.75
    assert size(layer).parameters == 16


def test_measuring_leaves_grad_mode_and_model() -> None:
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity(model)
    size(model)
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_size_against_real_storage(shape: list[int], density: float, dtype: torch.dtype) -> None:
    values = (torch.rand(shape) + 0.5) * (torch.rand(shape) < density)
    model = nn.Module()
    model.weight = nn.Parameter(values.to(dtype))
    found = size(model)
    flat = model.weight.detach().flatten()
    kept = flat[flat != 0]
    assert found.parameters == flat.numel()
    assert found.zeros == flat.numel() - kept.numel()
    assert found.dense_bytes == flat.numel() * flat.element_size()
    bits = math.ceil(flat.numel() / 8)
    assert found.bitmap_bytes == min(found.dense_bytes, bits + kept.nbytes)
    matrix = flat.reshape(shape[0] if len(shape) > 1 else 1, -1) if flat.numel() else None
    if matrix is None:
        assert found.csr_bytes == 0
        return
    rows = torch.arange(matrix.shape[0] + 1, dtype=torch.int32)
    columns = (matrix != 0).nonzero()[:, 1].int()
    assert found.csr_bytes == min(found.dense_bytes, kept.nbytes + columns.nbytes + rows.nbytes)


def test_size_reads_well() -> None:
    text = str(size(nn.Linear(1000, 1000)))
    assert text.startswith("1,001,000 parameters, 0.00 % zero: 4.004 MB dense, 4.004 MB as bitmap")
    assert size(nn.ReLU()).sparsity == 0


@pytest.mark.parametrize("nothing", [nn.ReLU(), [], torch.empty(0)])
def test_sparsity_of_nothing(nothing: Any) -> None:
    with pytest.raises(ValueError, match="no weight to count"):
        sparsity(nothing)


def test_sparsity_of_a_state_dict() -> None:
    with pytest.raises(TypeError, match=r"got 'weight' among them; .*\.values\(\)"):
        sparsity(nn.Linear(2, 2).state_dict())
