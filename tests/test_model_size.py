"""The whole story of what a model takes: counts, files, multiply-adds and times."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from html_tables import tables_of
from sparse_models import sparse_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from toys import TwoTasks, batch, prepare, train

from torch_adapmtl import find_components, keep_zeros, save_sparse, size


class Halve(nn.Module):
    """A parametrization that makes half of the entries zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.numel()).reshape(weight.shape) % 2)


class Convolutions(nn.Module):
    """Two tasks after convolutions of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2, groups=4)
        )
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.kind = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"map": self.up(y), "kind": self.kind(y.mean((2, 3)))}


@pytest.mark.parametrize("images", [1, 3])
def test_multiply_adds_are_those_of_the_flop_counter(images: int) -> None:
    model, x = Convolutions(), torch.randn(images, 3, 17, 15)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = size(model, x)
    assert found.macs is not None
    assert found.macs_left == found.macs
    assert 2 * images * found.macs == counter.get_total_flops()
    assert {row.name for row in found.components} == {"shared", "map", "kind", "other"}


def test_zeros_save_multiply_adds() -> None:
    model, x = Convolutions(), torch.randn(1, 3, 17, 15)
    with torch.no_grad():
        model.up.weight[:, :, 0] = 0
    found = {row.name: row for row in size(model, x).layers}
    row = found["up.weight"]
    assert (row.weights, row.nonzeros, row.component) == (8 * 4 * 9, 8 * 4 * 6, "map")
    assert row.macs_left == pytest.approx(row.macs * 2 / 3)
    assert found["up.bias"].component == "other"
    assert found["up.bias"].macs is None


def test_files_are_measured(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 100))
    prune.l1_unstructured(model[0], "weight", 0.9)
    found = size(model, dtypes=[torch.bfloat16])
    assert found.files["save_sparse"] == save_sparse(model, tmp_path / "x").size
    assert (
        found.files["save_sparse, bfloat16"]
        == save_sparse(model, tmp_path / "x", dtype=torch.bfloat16).size
    )
    prune.remove(model[0], "weight")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert found.files["torch.save"] == pytest.approx(len(file.getvalue()), rel=0.01)
    assert sum(row.dense_bytes for row in found.layers) == sum(
        x.nbytes for x in model.state_dict().values()
    )
    assert sum(row.bytes for row in found.layers) < found.files["save_sparse"]
    assert found.macs is None
    assert [row.name for row in found.components] == ["model"]


def test_parameters_count_as_the_forward_pass_uses_them() -> None:
    layer = nn.Linear(4, 4, bias=False)
    parametrize.register_parametrization(layer, "weight", Halve())
    assert (size(layer).zeros, size(layer).parameters) == (8, 16)

    layer = nn.Linear(4, 4, bias=False)
    prune.custom_from_mask(layer, "weight", torch.arange(16).reshape(4, 4) < 12)
    parametrize.register_parametrization(layer, "weight_orig", Halve())
    assert size(layer).parameters == 16

    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    assert size(model).parameters == 12 + 4 + 12 + 4


def test_a_model_in_the_middle_of_a_run() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), range(12))
    report, before = pruner.report(), copy.deepcopy(model.state_dict())
    found = size(model, components=report)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    rows = {row.name: row for row in found.components}
    for part in report.components:
        assert rows[part.name].nonzeros == part.weights - part.zeros
        assert rows[part.name].macs == part.macs
        assert rows[part.name].macs_left == part.macs_left


def test_a_finalised_model_and_its_components_otherwise() -> None:
    model, x = sparse_model(0.6), batch(0)[0]
    found = size(model, x)
    assert size(model, components=find_components(model, x)) == found
    assert {row.name for row in found.components} == {"shared", "a", "b", "other"}


def test_a_model_with_one_output_is_one_component() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 9))
    found = size(model, torch.randn(5, 20))
    assert [row.name for row in found.components] == ["model", "other"]
    assert found.macs == 20 * 30 + 30 * 9


def test_times_are_those_of_accelerate() -> None:
    model, x = sparse_model(0.9), batch(0)[0]
    found = size(model, x, latency=True)
    assert set(found.latency) == {"as it is", "folded", "accelerated"}
    assert all(ms > 0 for ms in found.latency.values())
    assert found.threads == torch.get_num_threads()
    times = {row.name: row.dense_ms for row in found.layers}
    assert times["body.weight"] is not None
    assert times["body.bias"] is None
    assert "time, ms (1 thread)" in str(found)
    assert "sparse ms" in str(found)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"latency=True needs example_inputs, found None"):
        size(TwoTasks(), latency=True)
    other = nn.Sequential(nn.Linear(2, 3))
    components = find_components(other, torch.randn(1, 2), groups={"main": ["*"]})
    with pytest.raises(ValueError, match=r"components has '0.weight', which the model has not"):
        size(TwoTasks(), components=components)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 9)), torch.randn(2, 8)
    assert size(wrap(model), x) == size(model, x)


def _with_kept_zeros() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.eye_(model[0].weight)
    return keep_zeros(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        _with_kept_zeros,
        lambda: nn.BatchNorm1d(8),
    ],
)
def test_models_whose_components_are_not_found(make: Callable[[], nn.Module]) -> None:
    """What is not known is said, and the rest is measured; nothing changes."""
    model, x = make().train(), torch.randn(2, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="components and multiply-adds are known"):
        found = size(model, x)
    assert all(torch.equal(y, before[name]) for name, y in model.state_dict().items())
    assert found.macs is None
    assert found.files["save_sparse"] > 0


def test_bytes_add_up_to_the_file() -> None:
    found = size(nn.Sequential(*(nn.Linear(70, 70) for _ in range(40))))
    _, parts, _ = tables_of(found)
    column = parts[0].index("bytes")
    assert sum(int(row[column].replace(",", "")) for row in parts[1:]) == found.files["save_sparse"]


def test_views_of_large_storages_count_as_what_they_are() -> None:
    model = nn.Linear(10, 10, bias=False)
    model.weight = nn.Parameter(torch.randn(2000, 10)[:10])
    assert size(model).files["torch.save"] < 3000


def test_tables(tmp_path: Path) -> None:
    model = nn.Linear(500, 500, bias=False)
    nn.init.eye_(model.weight)
    found = size(model, torch.zeros(1, 500), dtypes=torch.int8)
    whole, parts, tensors = tables_of(found)
    assert whole[0] == ["", "dense", "sparse", "ratio"]
    assert whole[1] == ["nonzero parameters", "250,000", "500", "500.0"]
    assert whole[2] == ["MACs of prunable weights, M", "0.25", "0.00", "500.0"]
    assert [row[0] for row in whole[3:]] == ["file, MB", "file, MB (int8)"]
    assert parts[1][:4] == ["model", "500", "0.20 %", "0.20 %"]
    assert tensors[1][0] == "weight"
    card = found.model_card("eye.safetensors").splitlines()
    assert "| nonzero parameters | 250,000 | 500 | 500.0 |" in card
    assert 'model = load_sparse("eye.safetensors", model)' in card
    assert json.loads(json.dumps(found.to_dict()))["components"][0]["nonzeros"] == 500


def test_models_without_parameters_or_nonzeros() -> None:
    assert size(nn.ReLU()).sparsity == 0
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    found = size(layer, torch.zeros(1, 3))
    assert found.sparsity == 1
    assert ["nonzero parameters", "12", "0", ""] in tables_of(found)[0]
