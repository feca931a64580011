"""Pruning models of many kinds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from toys import Bag, TwoTasks, batch, prepare, tensors, train, weights, zeros

from torch_adapmtl import Pruner, apply_adapmtl


def _run(model: nn.Module, pruner: Pruner, loss: Any, target: float = 0.8) -> None:
    """Train to the end and finalise, and check what must hold of every model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        pruner.loss(loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    model.eval()
    with torch.no_grad():
        expected = loss()
        wanted = round(target * weights(pruner))
        assert zeros(pruner) == wanted
        pruner.finalize()
        assert zeros(pruner) == wanted
        assert all(torch.equal(expected[task], value) for task, value in loss().items())


def test_a_row_of_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = prepare(model, groups={"only": ["*"]}, example_inputs=None)
    assert pruner.components.names == ("only",)
    assert len(model) == 4
    _run(model, pruner, lambda: {"only": model(batch(0)[0]).square().mean()})
    assert len(model) == 3


class _Split(nn.Module):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.a(h), self.b(h)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize(
    ("body", "shape", "width", "counted", "options"),
    [
        (nn.Linear(6, 6), (3, 6), 6, 36, {}),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), 2, 48, {}),
        (nn.ConvTranspose1d(3, 4, 2), (2, 3, 5), 6, 24, {}),
        (_Attention(), (2, 4, 6), 6, 18 * 6 + 36, {}),
        (nn.LSTM(6, 5), (4, 2, 6), 5, 20 * 6 + 20 * 5, {"prunable": {nn.LSTM: "weight_*"}}),
        (nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), (2, 4, 6), 6, 240, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_kinds_of_layers(
    body: nn.Module, shape: Any, width: int, counted: int, options: dict[str, Any]
) -> None:
    model, x = _Split(body, width), torch.randn(*shape)
    before = list(model.state_dict())
    pruner = prepare(model, example_inputs=x, **options)
    assert weights(pruner) == counted + 4 * width
    _run(model, pruner, lambda: dict(zip("01", (o.square().mean() for o in model(x)), strict=True)))
    assert list(model.state_dict()) == before


class _Transposed(nn.Module):
    """Multiplies a view that is not contiguous, which torch does in one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2))


@pytest.mark.parametrize(
    ("body", "shape", "options"),
    [
        (_Transposed(), (2, 96, 4), {}),
        (nn.LSTM(96, 96, batch_first=True), (2, 4, 96), {"prunable": {nn.LSTM: "weight_*"}}),
    ],
    ids=["transposed", "LSTM"],
)
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.enable_grad])
def test_the_sparse_weight_is_used_as_the_parameter_is(
    body: nn.Module, shape: Any, options: dict[str, Any], quiet: Any
) -> None:
    model, x = _Split(body, 96).eval(), torch.randn(*shape)
    pruner = prepare(model, example_inputs=x, **options)
    pruner.fix_zeros()
    with quiet():
        before = model(x)
    pruner.finalize()
    with quiet():
        assert all(map(torch.equal, before, model(x)))


def test_tied_weights_count_once() -> None:
    model = TwoTasks()
    model.heads["b"] = nn.Linear(12, 5)
    model.heads["b"].weight = model.heads["a"].weight
    pruner = prepare(model)
    assert weights(pruner) == 72 + 60
    _run(model, pruner, lambda: {"a": model(batch(0)[0])["a"].mean(), "b": losses_b(model)})
    assert model.heads["b"].weight is model.heads["a"].weight


def losses_b(model: nn.Module) -> Tensor:
    return model(batch(1)[0])["b"].square().mean()


def test_masks_of_torch_come_back() -> None:
    model = TwoTasks()
    for name in ("bias", "weight"):
        prune.random_unstructured(model.body, name, amount=0.5)
    prune.ln_structured(model.heads["a"], "weight", amount=1, n=2, dim=0)
    keys, before = list(model.state_dict()), tensors(model)
    pruner = prepare(model, min_density={"a": 0.05})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(20):
        train(model, pruner, optimizer, [step])
        assert not model.body.weight[before["body.weight_mask"] == 0].any()
        assert not model.heads["a"].weight[before["heads.a.weight_mask"] == 0].any()
    x = batch(7)[0]
    expected = model(x)
    pruner.finalize()
    assert list(model.state_dict()) == keys
    assert all(torch.equal(expected[task], out) for task, out in model(x).items())
    for key, value in model.state_dict().items():
        if key.endswith("_mask"):
            assert torch.equal(value, before[key])
    assert prune.is_pruned(model)
    assert zeros(pruner) == round(0.8 * weights(pruner))
    prune.remove(model.body, "weight")
    assert not model.body.weight[before["body.weight_mask"] == 0].any()


def test_channels_last_weights() -> None:
    model = Bag([(8, 6, 3, 3), (4, 8, 3, 3)], torch.float32)
    model.to(memory_format=torch.channels_last)
    groups = {"a": ["layers.0"], "b": ["layers.1"]}
    pruner = apply_adapmtl(model, target_sparsity=0.7, total_steps=20, groups=groups)
    _run(model, pruner, lambda: model.losses(groups), target=0.7)
    assert model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_and_unused_parts_stay_dense_and_uncounted() -> None:
    model = TwoTasks()
    model.spare = nn.Linear(6, 6)
    model.heads["b"].weight.requires_grad_(False)
    before = tensors(model)
    pruner = prepare(model)
    pruner.fix_zeros()
    assert weights(pruner) == 6 * 12 + 12 * 5
    assert {(name, reason) for name, reason, _ in pruner.report().dense} == {
        ("spare.weight", "unused"), ("heads.b.weight", "frozen"),
    }  # fmt: skip
    pruner.finalize()
    assert zeros(pruner) == round(0.8 * 132)
    for name in ("spare.weight", "heads.b.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_parametrization_of_the_users_stays_on_top() -> None:
    model = TwoTasks()
    spectral_norm(model.body)
    keys = list(model.state_dict())
    pruner = prepare(model)
    pruner.fix_zeros()
    pruner.finalize()
    assert list(model.state_dict()) == keys
    baked = model.body.parametrizations.weight.original == 0
    assert baked.any()
    assert torch.equal(model.body.weight == 0, baked)


def test_a_freeze_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = TwoTasks()
    pruner = prepare(model)
    with torch.inference_mode():
        pruner.fix_zeros()
    sum(out.sum() for out in model(torch.randn(3, 6)).values()).backward()


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(50, 8), nn.LSTM(8, 8, batch_first=True)
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        last = self.body(self.words(x))[0][:, -1]
        return {"a": self.a(last), "b": self.b(last)}


def test_what_is_not_prunable_is_named() -> None:
    options = {"target_sparsity": 0.5, "total_steps": 2, "example_inputs": torch.ones(2, 3).long()}
    with pytest.warns(UserWarning, match="912 of 936, 'words.weight' the largest.* 24 others"):
        pruner = apply_adapmtl(_Reader(), **options)
    assert {part.name: part.reason for part in pruner.report().dense} == {
        "words.weight": "not prunable",
        "body.weight_ih_l0": "not prunable",
        "body.weight_hh_l0": "not prunable",
    }
    model = _Reader()
    keys = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            apply_adapmtl(model, **options)
    assert list(model.state_dict()) == keys  # an error leaves the model as it was
    apply_adapmtl(model, exclude=["words", "body"], **options)
    pruner = apply_adapmtl(_Reader(), prunable={nn.LSTM: "weight_*"}, **options)
    assert [part.name for part in pruner.report().dense] == ["words.weight"]
